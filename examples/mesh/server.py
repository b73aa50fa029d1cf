#!/usr/bin/env python3
"""A container of the service: answers each connection with who it is, and who has connected.

Usage: server.py NAME HOST
"""

import socketserver
import sys

PORT = 8080


class Handler(socketserver.BaseRequestHandler):
    """Sends `NAME HOST CLIENT`, and closes the connection."""

    def handle(self):
        name, host = sys.argv[1:]
        client = self.client_address[0]
        self.request.sendall(f"{name} {host} {client}\n".encode())


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    # The default of 5 is less than the connections of one round trip under load.
    request_queue_size = 128


with Server(("", PORT), Handler) as server:
    print("listening", flush=True)
    server.serve_forever()
