"""Reinforcement learning with verifiable rewards: GRPO of plans and executions, on TRL."""
