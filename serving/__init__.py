"""Answers to questions of users: on the command line, over a data set, and as an OpenAI-compatible server."""
