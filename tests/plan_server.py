"""An OpenAI-compatible server on loopback for the tests, which replies as a test tells it to."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Takes many connections at once."""

    request_queue_size = 128


class PlanServer:
    """Serves while it is entered.

    Args:
        reply: takes the body of a request; returns the text of the reply, the fields of its choice, or a status above
            399.
    """

    def __init__(self, reply):
        self.reply = reply
        self.bodies = []  # of all requests, in the order in which they came
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.server = Server(("127.0.0.1", 0), self._make_handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, body):
        """Status and content."""
        with self.lock:
            self.bodies.append(body)
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            reply = self.reply(body)
        finally:
            with self.lock:
                self.under_way -= 1
        if isinstance(reply, int):
            return reply, {"error": {"message": f"status {reply}"}}
        fields = {"content": reply, "finish_reason": "stop"} if isinstance(reply, str) else reply
        message = {"role": "assistant", "content": fields["content"]}
        choice = {"index": 0, "message": message, "finish_reason": fields["finish_reason"]}
        return 200, {"id": "0", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice]}

    def _make_handler(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, content = outer.answer(body | {"path": self.path})
                content = json.dumps(content).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.send_header("retry-after-ms", "1")
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client is gone
                    self.close_connection = True

            def log_message(self, *args):
                """Says nothing."""

        return Handler
