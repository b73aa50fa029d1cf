#!/usr/bin/env python3
"""Connects to a service through several hosts in turn, and prints which container answers.

Usage: client.py [--demo] DIRECTORY HOST=ADDRESS...

It runs in the network namespace of the switch, whose link to a host has the name of the host.
DIRECTORY/HOST/socket is the socket of the daemon of a host.
"""

import argparse
import asyncio
import os
import sys
import time
from dataclasses import dataclass, field

PORT = 80
# Seconds after which a connection has failed. The kernel repeats an unanswered SYN after 1 s.
TIMEOUT = 2.0
# Seconds between two connections.
INTERVAL = 0.2
DEMO_INTERVAL = 0.02
# Seconds from the start of the demonstration. The host is unplugged halfway between two connections,
# when none is open: one to its container would be lost.
DEMO_UNPLUG = 3.0 + DEMO_INTERVAL / 2
DEMO_RESTORE = 7.0
DEMO_END = 10.0
# Connections of the demonstration that take longer than this have a line of their own. A host that
# is not heard for this time is `silent`.
SLOW = 0.25

# `run` sets the terminal so that it is a key, and ends this program alone.
CTRL_C = "\x03"
KEYS = "keys: k unplugs a host, r restores it, s prints the status, q ends"
HEADING = "   time  through  answered by        client seen          took  failures"


@dataclass
class Host:
    """A host, and the connections through it."""

    name: str
    address: str
    is_plugged: bool = True
    unplugged_at: float = float("-inf")
    restored_at: float = float("-inf")
    # Seconds of each successful connection.
    times: list = field(default_factory=list)
    failures: int = 0
    # Failures that unplugging explains.
    failures_unplugged: int = 0

    def record(self, connection):
        if not connection.error:
            self.times.append(connection.took)
        elif connection.is_affected:
            self.failures_unplugged += 1
        else:
            self.failures += 1


@dataclass
class Connection:
    """A connection that has ended."""

    host: Host
    took: float
    # `CONTAINER HOST CLIENT`, as server.py sends it.
    answer: str = ""
    error: str = ""
    # Whether unplugging explains a failure.
    is_affected: bool = False

    def columns(self):
        if self.error:
            text = f"FAILED: {self.error}"
        else:
            container, host, client = self.answer.split()
            text = f"{container + ' on ' + host:18} {client}"
        return f"{self.host.name:8} {text:33} {milliseconds(self.took)}"


class Load:
    """Connections through all hosts in turn."""

    def __init__(self, hosts, report):
        self.hosts = hosts
        self.report = report
        self.begun = time.monotonic()
        self.tasks = set()

    async def run(self, interval, duration):
        """Begins a connection every `interval` seconds, and waits for the last one."""
        number = 0
        while number * interval < duration:
            await asyncio.sleep(self.begun + number * interval - time.monotonic())
            # A slow connection does not delay the others.
            task = asyncio.create_task(self.connect(self.hosts[number % len(self.hosts)]))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            number += 1
        await asyncio.gather(*self.tasks)

    async def connect(self, host):
        begun = time.monotonic()
        answer = error = ""
        try:
            answer = await asyncio.wait_for(ask(host.address), TIMEOUT)
        except asyncio.TimeoutError:
            error = "timed out"
        except (OSError, ValueError) as cause:
            error = getattr(cause, "strerror", None) or str(cause)
        took = time.monotonic() - begun
        connection = Connection(host, took, answer, error, self.is_affected(host, begun))
        host.record(connection)
        self.report(connection)

    def is_affected(self, host, begun):
        """Whether unplugging explains a failure: of a connection through the unplugged host, or of
        one that was open when a host was unplugged. Its container may have been on that host.
        """
        is_through = not host.is_plugged or begun < host.restored_at
        return is_through or any(begun < other.unplugged_at for other in self.hosts)

    def seconds(self):
        return time.monotonic() - self.begun

    def failures(self):
        """The number of failures so far, without and with those that unplugging explains."""
        plugged = sum(host.failures for host in self.hosts)
        unplugged = sum(host.failures_unplugged for host in self.hosts)
        return f"{plugged} + {unplugged} unplugged" if unplugged else f"{plugged}"


async def ask(address):
    """Returns the answer of a container at `address`."""
    reader, writer = await asyncio.open_connection(address, PORT)
    try:
        answer = (await reader.read()).decode()
    finally:
        writer.close()
    if len(answer.split()) != 3:
        raise ValueError("closed without an answer")
    return answer


async def output_of(*command, **more):
    """Runs a command. Returns its output and its errors."""
    pipe, stdout = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=stdout, **more)
    output, _ = await process.communicate()
    return output.decode().rstrip()


async def unplug(host):
    """Takes the link of the switch to a host down. Nothing tells the other hosts."""
    host.is_plugged = False
    error = await output_of("ip", "link", "set", host.name, "down")
    host.unplugged_at = time.monotonic()
    print(f"--- {error or f'{host.name} unplugged'}", flush=True)


async def restore(host):
    host.is_plugged = True
    error = await output_of("ip", "link", "set", host.name, "up")
    host.restored_at = time.monotonic()
    print(f"--- {error or f'{host.name} restored'}", flush=True)


class Interactive:
    """Prints every connection, and follows the keys of the terminal."""

    def __init__(self, directory, hosts):
        self.directory = directory
        self.hosts = hosts
        self.load = Load(hosts, self.report)
        # The host that `k` unplugs next: the last one first, as it has the fewest containers.
        self.next = len(hosts) - 1
        self.tasks = set()

    async def run(self):
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        print(f"\n{KEYS}\n\n{HEADING}")
        loop.add_reader(sys.stdin, self.read_keys, ended)
        load = asyncio.create_task(self.load.run(INTERVAL, float("inf")))
        await ended.wait()
        load.cancel()
        loop.remove_reader(sys.stdin)
        print_summary(self.hosts)
        return 0

    def report(self, connection):
        now = self.load.seconds()
        print(f"{now:5.1f} s  {connection.columns()}  {self.load.failures()}", flush=True)

    def read_keys(self, ended):
        keys = os.read(sys.stdin.fileno(), 64).decode(errors="replace")
        # At the end of the input, the terminal has been closed.
        for key in keys or "q":
            if key in ("q", CTRL_C):
                ended.set()
            elif action := {"k": self.unplug, "r": self.restore, "s": self.status}.get(key):
                task = asyncio.create_task(action())
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)

    def unplugged(self):
        return next((host for host in self.hosts if not host.is_plugged), None)

    async def unplug(self):
        if host := self.unplugged():
            print(f"--- {host.name} is unplugged; restore it first (r)", flush=True)
            return
        host = self.hosts[self.next]
        self.next = (self.next - 1) % len(self.hosts)
        await unplug(host)

    async def restore(self):
        if host := self.unplugged():
            await restore(host)
        else:
            print("--- no host is unplugged", flush=True)

    async def status(self):
        """Prints what a host sees that is not cut off."""
        host = next(host for host in self.hosts if host.is_plugged)
        socket = f"{self.directory}/{host.name}/socket"
        environment = {**os.environ, "TIDEGATE_SOCKET": socket}
        text = ""
        for args in (["service", "ls"], ["mesh", "status"]):
            output = await output_of("tidegate", *args, env=environment)
            text += f"--- on {host.name}: tidegate {' '.join(args)}\n{output}\n"
        print(f"{text}---", flush=True)


class Demo:
    """Unplugs and restores the last host, and prints a line for each second."""

    def __init__(self, hosts):
        self.hosts = hosts
        self.load = Load(hosts, self.report)
        self.ended = []

    async def run(self):
        print(f"{1 / DEMO_INTERVAL:.0f} connections per second for {DEMO_END:.0f} s")
        load = asyncio.create_task(self.load.run(DEMO_INTERVAL, DEMO_END))
        seconds = asyncio.create_task(self.print_seconds())
        await self.sleep_until(DEMO_UNPLUG)
        await unplug(self.hosts[-1])
        await self.sleep_until(DEMO_RESTORE)
        await restore(self.hosts[-1])
        await asyncio.gather(load, seconds)
        print_summary(self.hosts)
        return self.judge()

    def judge(self):
        """Returns the exit status: success if the other hosts have served everything."""
        others = self.hosts[:-1]
        failures = sum(host.failures for host in others)
        names = " and ".join(host.name for host in others)
        if failures or not all(host.times for host in others):
            print(f"failed: {failures} connections through {names} failed")
            return 1
        lost = sum(host.failures_unplugged for host in others)
        exception = f", except {lost} that began before the host was unplugged" if lost else ""
        print(f"passed: every connection through {names} was answered{exception}")
        return 0

    async def sleep_until(self, seconds):
        await asyncio.sleep(self.load.begun + seconds - time.monotonic())

    def report(self, connection):
        self.ended.append(connection)
        if not connection.is_affected and (connection.error or connection.took > SLOW):
            print(f"{self.load.seconds():5.1f} s  {connection.columns()}", flush=True)

    async def print_seconds(self):
        for second in range(1, int(DEMO_END) + 1):
            await self.sleep_until(second)
            ended, self.ended = self.ended, []
            answers = [one.answer.split()[0] for one in ended if one.answer]
            counts = "  ".join(f"{name} {answers.count(name)}" for name in sorted(set(answers)))
            print(f"{second:5.1f} s  {counts}  failures {self.load.failures()}", flush=True)


def print_summary(hosts):
    """Prints a table of the connections through each host."""
    print("\nthrough  answered  failed + unplugged     median        p99        max")
    for host in hosts:
        times = sorted(host.times)
        ranks = (len(times) // 2, len(times) * 99 // 100, -1) if times else ()
        columns = "  ".join(milliseconds(times[rank]) for rank in ranks)
        failures = f"{host.failures} + {host.failures_unplugged}"
        print(f"{host.name:8} {len(host.times):8}  {failures:>18}  {columns}", flush=True)


def milliseconds(seconds):
    return f"{seconds * 1000:6.1f} ms"


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("directory")
    parser.add_argument("hosts", nargs="+", type=lambda pair: Host(*pair.split("=")))
    return parser.parse_args()


def main():
    options = arguments()
    view = Demo(options.hosts) if options.demo else Interactive(options.directory, options.hosts)
    try:
        return asyncio.run(view.run())
    except BrokenPipeError:
        # Python would report it once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1


sys.exit(main())
