"""Send a recording, or audio as it is recorded, to scribe and print the text.

    python client.py audio.wav
    arecord -f S16_LE -r 16000 | python client.py -
    ffmpeg -i talk.mp4 -f s16le -ar 16000 -ac 1 - | python client.py - --format pcm_s16le

The exit code is 0 only if everything was transcribed. Otherwise the last line on stderr says why not.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///

from __future__ import annotations

import argparse
import asyncio
import html
import json
import os
import random
import signal
import socket
import stat
import sys
import threading
import time
import unicodedata
from contextlib import suppress
from io import FileIO, StringIO, TextIOWrapper
from typing import Any, NoReturn, TextIO
from urllib.parse import parse_qsl, urlencode, urlsplit

try:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, WebSocketException
    from websockets.http11 import Response
except ImportError:
    sys.exit("client.py needs one package: pip install 'websockets>=17'")

Message = dict[str, Any]  # one JSON message of the server
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


class Failure(Exception):
    """Ends the program with exit code 1. The message is the one line that the user sees."""


class Lost(Exception):
    """The connection failed in a way that may pass. `wait`: seconds the server asks for (Retry-After)."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


# Options. Those of the wire have the wire's names, and only those given are sent: defaults, checks and their
# messages are the server's.

WIRE_OPTIONS = ("format", "rate", "channels", "language", "prompt", "task", "interim", "words")
MAX_CHUNK = 2**20  # bytes; the server takes no longer message


def chunk_size(text: str) -> int:
    """A number of bytes that fits into one message."""
    if not 1 <= int(text) <= MAX_CHUNK:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_CHUNK} bytes")
    return int(text)


def parse_options() -> argparse.Namespace:
    """The command line; a wrong one ends the program with exit code 2, as argparse does."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=style)
    add = parser.add_argument
    add("audio", help="a file, or - for standard input")
    add("--uri", default="ws://localhost:8000/ws", help="the server (default: %(default)s)")
    add("--token", default=os.environ.get("SCRIBE_TOKEN"), help="access token (default: $SCRIBE_TOKEN)")
    add("--output", choices=("txt", "srt", "vtt", "json"), default="txt", help="default: txt, as it comes")
    add("--chunk-size", type=chunk_size, default=4096, metavar="BYTES", help="default: %(default)s")
    add("--realtime", action="store_true", help="send WAV or raw audio at the speed at which it plays")
    add("--no-resume", dest="resume", action="store_false", help="give up when the connection is lost")
    add("--retry-seconds", type=float, default=120, metavar="S", help="to reconnect (default: %(default)s)")
    add = parser.add_argument_group("what the server is asked for").add_argument
    add("--format", help="auto (default), or raw: pcm_s16le, pcm_f32le, mulaw, alaw")
    add("--rate", type=int, help="of raw audio (default: 16000)")
    add("--channels", type=int, help="of raw audio (default: 1)")
    add("--language", help="what is spoken, for example en")
    add("--prompt", help="names and jargon to expect")
    add("--task", help="transcribe (default), or translate (to English)")
    add("--interim", action="store_const", const="true", help="show text before it is final (on a terminal)")
    add("--words", action="store_const", const="true", help="ask for word times (for --output json)")
    return parser.parse_args()


# Audio. A source gives the bytes from any position that the server has not acknowledged yet, so that a
# resumed session goes on where the server stands. A regular file is simply read again. Of a pipe, what is not
# acknowledged is kept, up to a limit; beyond it the pipe is not read, and whoever writes to it waits.

KEEP_BYTES = 2**25  # of a pipe: 17 minutes at 16 kHz, 3 at 48 kHz stereo; more than --retry-seconds
READ_BYTES = 2**16  # all that a pipe holds on Linux
HEAD_BYTES = 2**12  # of a stream, where WAV tells its rate
SAMPLE_BYTES = {"pcm_s16le": 2, "pcm_f32le": 4, "mulaw": 1, "alaw": 1}


def wav_byte_rate(head: bytes) -> int | None:
    """Bytes per second, from the `fmt ` chunk of a WAV file; None if `head` has none."""
    if head[:4] not in (b"RIFF", b"RF64") or head[8:12] != b"WAVE":
        return None
    at = 12
    while head[at : at + 4] not in (b"fmt ", b""):
        size = int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return int.from_bytes(head[at + 16 : at + 20], "little") or None


class FileAudio:
    """A regular file from its current offset on. `shortfall` says why it was not sent to its end."""

    shortfall = ""

    def __init__(self, file: FileIO, byte_rate: int | None) -> None:
        self.file = file
        self.base = file.tell()
        self.size = os.fstat(file.fileno()).st_size - self.base
        self.reached = 0  # the furthest position read
        if self.size <= 0:
            raise Failure("the file is empty")
        self.byte_rate = byte_rate or wav_byte_rate(file.read(HEAD_BYTES))  # None: only a decoder could tell

    async def read(self, position: int, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        try:
            self.file.seek(self.base + position)
            chunk = self.file.read(max(0, min(size, self.size - position)))
        except OSError as error:
            self.shortfall = f"cannot read the file beyond byte {position}: {error.strerror}"
            self.size, chunk = position, b""
        self.reached = max(self.reached, position + len(chunk))
        return chunk

    def forget(self, received: int) -> None:
        """The server has this many bytes for good. Nothing is kept of a file anyway."""

    def end(self) -> None:
        """Stop after what was read already."""
        if self.reached < self.size:
            self.shortfall = f"stopped after {self.reached} of {self.size} bytes"
            self.size = self.reached


class PipeAudio:
    """A pipe, a device or a terminal, read by a thread that may block for ever and yet not hold up the exit.

    The thread hands each block to the event loop, to which all else belongs, and waits for room.
    """

    shortfall = ""

    def __init__(self, file: FileIO, byte_rate: int | None) -> None:
        self.file = file
        self.byte_rate = byte_rate
        self.kept = bytearray()  # read and not acknowledged
        self.start = 0  # position of its first byte
        self.ended = False
        self.arrived = asyncio.Event()
        self.room = threading.Event()
        threading.Thread(target=self._pump, args=(asyncio.get_running_loop(),), daemon=True).start()

    def _pump(self, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop is closed: the program ends
            try:
                while data := os.read(self.file.fileno(), READ_BYTES):
                    self.room.clear()
                    loop.call_soon_threadsafe(self._take, data)
                    self.room.wait()
            except OSError as error:
                self.shortfall = f"cannot read the input any further: {error.strerror}"
            loop.call_soon_threadsafe(self.end)

    def _take(self, data: bytes) -> None:
        if self.ended:
            return
        self.kept += data
        if not self.start:
            self.byte_rate = self.byte_rate or wav_byte_rate(bytes(self.kept[:HEAD_BYTES]))
        self.arrived.set()
        self.forget(self.start)

    async def read(self, position: int, size: int) -> bytes:
        """Up to `size` bytes as soon as there are any; none at the end."""
        if not self.start <= position <= self.start + len(self.kept):
            raise Failure(f"cannot go on from byte {position}, where the server stands: it is not kept")
        while position == self.start + len(self.kept) and not self.ended:
            self.arrived.clear()
            await self.arrived.wait()
        at = position - self.start
        return bytes(self.kept[at : at + size])

    def forget(self, received: int) -> None:
        """The server has this many bytes for good."""
        del self.kept[: max(0, received - self.start)]
        self.start = max(self.start, received)
        if len(self.kept) < KEEP_BYTES:
            self.room.set()

    def end(self) -> None:
        """Stop after what was read already."""
        self.ended = True
        self.arrived.set()


def open_audio(options: argparse.Namespace) -> FileAudio | PipeAudio:
    """The source that the command line names; raises Failure."""
    byte_rate = SAMPLE_BYTES.get(options.format, 0) * (options.rate or 16000) * (options.channels or 1)
    try:
        file = FileIO(0, closefd=False) if options.audio == "-" else FileIO(options.audio)
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        return (FileAudio if regular else PipeAudio)(file, byte_rate or None)
    except (OSError, ValueError, Failure) as error:  # ValueError: a null byte in the name
        raise Failure(f"cannot read {options.audio}: {getattr(error, 'strerror', None) or error}") from None


# Display. Text goes to stdout, messages to stderr. On a terminal there is also a live area below them: the
# unsettled text in grey, and a line of progress. It is drawn over itself in one write, so that it does not
# flicker, and taken away before anything else is written, as stdout and stderr may be the same terminal.

DRAW_SECONDS = 0.1
DIM, PLAIN, END_LINE, END_SCREEN, UP = "\x1b[2m", "\x1b[m", "\x1b[K", "\x1b[J", "\x1b[A"  # ECMA-48
CONTROLS = dict.fromkeys([*range(32), *range(127, 160)])  # what a terminal might obey


def one_line(text: str) -> str:
    """Text without line breaks and control characters."""
    return " ".join(text.split()).translate(CONTROLS)


def fit(text: str, columns: int) -> str:
    """As much of the end of a text as fits; East Asian characters take two columns."""
    for at in range(len(text) - 1, -1, -1):
        columns -= 2 if unicodedata.east_asian_width(text[at]) in "WF" else 1
        if columns < 0:
            return "…" + text[at + 2 :]
    return text


def clock(seconds: float, point: str = ".") -> str:
    """Hours, minutes, seconds and milliseconds as WebVTT writes them, or SRT with a comma for the point."""
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"


def closed(segments: list[Message], whole: str) -> list[Message]:
    """Segments as the whole text spells them: where a sentence goes on over a cut it has no full stop."""
    found: list[Message] = []
    for segment in segments:
        text = segment["text"] if whole.startswith(segment["text"]) else segment["text"].rstrip(" .…")
        if not whole.startswith(text):
            return segments  # it is the text of others
        found.append({**segment, "text": text})
        whole = whole[len(text) :].lstrip()
    return found


def render(output: str, complete: Message, segments: list[Message]) -> str:
    """A whole result as `srt`, `vtt` (W3C WebVTT, in which `&`, `<` and `>` are markup) or `json`."""
    segments = closed(segments, complete.get("full_transcription", ""))
    if output == "json":
        kept = [{key: s[key] for key in s if key not in ("type", "received")} for s in segments]
        return json.dumps({**complete, "segments": kept}, ensure_ascii=False, indent=2)
    point = "," if output == "srt" else "."
    cues = [] if output == "srt" else ["WEBVTT\n"]
    for number, s in enumerate(segments, 1):
        text = one_line(s["text"]) if output == "srt" else html.escape(one_line(s["text"]), quote=False)
        label = f"{number}\n" if output == "srt" else ""
        cues.append(f"{label}{clock(s['start'], point)} --> {clock(s['end'], point)}\n{text}\n")
    return "\n".join(cues).removesuffix("\n")


class Display:
    """Writes everything that the user sees, and collects the transcriptions by their sequence numbers."""

    def __init__(self, output: str) -> None:
        self.output = output
        self.segments: dict[int, Message] = {}
        self.interim = ""
        self.interim_start = 0.0  # seconds
        self.sent = ""  # how much, for the progress
        self.transcribed = 0.0  # seconds
        self.words = 0
        capable = os.environ.get("TERM") != "dumb"
        self.shows_interim = capable and sys.stdout.isatty()
        self.shows_progress = capable and sys.stderr.isatty()
        self.terminal = sys.stderr if self.shows_progress else sys.stdout
        self.drawn: list[str] = []

    def transcription(self, message: Message) -> None:
        """Take up a transcription; a resumed session may repeat some."""
        start, end, text = message["start"], message["end"], one_line(message["text"])
        if message["sequence"] in self.segments:
            return
        self.segments[message["sequence"]] = message
        self.transcribed = max(self.transcribed, end)
        self.words += len(text.split())
        if self.interim_start < end:
            self.interim = ""
        if self.output == "txt" and text:
            late = f"[late, {clock(start)} to {clock(end)}] " if message.get("late") else ""
            self.write(late + text, sys.stdout)

    def note(self, text: str) -> None:
        """A message to the user, apart from the text."""
        self.write(one_line(text), sys.stderr)

    def finish(self, complete: Message | None) -> None:
        """Take the live area away, and print what has to wait for the end: late text may go in the middle."""
        self.clear()
        attended, self.shows_interim, self.shows_progress = self.shows_progress, False, False
        segments = sorted((s for s in self.segments.values() if s["text"].strip()), key=lambda s: s["start"])
        if self.output != "txt" and (complete or segments):
            self.write(render(self.output, complete or {}, segments), sys.stdout)
        if not complete:
            return
        if (complete.get("archive") or {}).get("stored") is False:
            self.note("The recording is not in the archive yet (stored: false); the server goes on trying.")
        if attended and "usage" in complete:
            billed = complete["usage"].get("billed_seconds")
            self.note(f"{complete.get('duration', 0):.1f} s of audio, {billed} s billed.")

    def write(self, text: str, stream: TextIO) -> None:
        """Whole lines above the live area; raises Failure when stdout takes no more."""
        self.clear()
        try:
            print(text, file=stream, flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is flushed at exit
            if stream is sys.stdout:
                raise Failure(f"cannot write the text: {error.strerror}") from None
        self.draw()

    def draw(self) -> None:
        """Bring the live area up to date."""
        if not (self.shows_interim or self.shows_progress):
            return
        lines = []
        columns = (os.get_terminal_size(self.terminal.fileno()).columns or 80) - 1
        if self.shows_interim and self.interim:
            lines.append(DIM + fit(self.interim, columns) + PLAIN)
        if self.shows_progress and self.sent:
            progress = f"{self.sent} sent, {self.transcribed:.1f} s transcribed, {self.words} words"
            lines.append(fit(progress, columns))
        if lines != self.drawn:
            self._redraw(f"{END_LINE}\n".join(lines))
            self.drawn = lines

    def clear(self) -> None:
        """Take the live area away."""
        if self.drawn:
            self._redraw("")
            self.drawn = []

    def _redraw(self, text: str) -> None:
        with suppress(OSError):
            up = UP * (len(self.drawn) - 1)
            print(f"{up}\r{text}{END_SCREEN}", end="", file=self.terminal, flush=True)

    async def keep_drawn(self) -> NoReturn:
        """Draw for as long as the program runs."""
        while True:
            self.draw()
            await asyncio.sleep(DRAW_SECONDS)


# Session. One transcription, over as many connections as it takes. The server's first message on each says
# from which byte to send; then a sender and a receiver run side by side, so that neither direction waits for
# the other. A connection that ends without `complete` is lost: after a pause another takes up the session.

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10  # seconds; doubled with every failed attempt
STEADY_SECONDS = 10  # a connection that held so long was good: what comes next is a new failure
READY_SECONDS = 30  # for the first message; a restarted server reads its spool before
FATAL_SECONDS = 60  # for each of the last words after a fatal error
CLOSE_SECONDS = 3  # for the server's close frame
MAX_MESSAGE = 2**26  # bytes; `complete` holds the text of the whole session
SEND_BUFFER = 2**18  # bytes in the kernel; more would put pings minutes behind on a slow line
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # never behind a proxy, whatever the environment says
PACED_BY_FFMPEG = "ffmpeg -re -i FILE -f wav - | python client.py -"


class Session:
    """Sends one source and shows its text; `complete` is the server's last message once it has come."""

    def __init__(self, options: argparse.Namespace, display: Display) -> None:
        self.options = options
        self.display = display
        self.audio = open_audio(options)
        self.id = ""
        self.greeted = False  # on this connection
        self.position = 0  # bytes sent
        self.received = 0  # bytes acknowledged
        self.began = 0.0  # when the first byte was recorded, so to speak, for --realtime
        self.attempts = 0  # failed ones since the last good connection
        self.deadline = 0.0  # for the next good one
        self.interrupted = False
        self.sent_all = False  # once, on whichever connection
        self.fatal = ""  # the server's last error
        self.gaps: list[str] = []
        self.reasons: list[str] = []  # of the gaps
        self.complete: Message | None = None

    async def run(self) -> None:
        """Return when everything is transcribed; raise Failure if it is not."""
        while not self.complete:
            opened = time.monotonic()
            try:
                await self.connect()
            except Lost as lost:
                if time.monotonic() - opened > STEADY_SECONDS:
                    self.attempts = 0
                await self.pause(lost)
        if self.fatal or self.audio.shortfall:
            raise Failure(self.fatal or self.audio.shortfall)
        if self.gaps:
            why = f" ({'; '.join(self.reasons)})" if self.reasons else ""
            raise Failure(f"not transcribed: {', '.join(self.gaps)}{why}")
        if not self.sent_all:
            raise Failure("the server ended the session before all audio was sent")
        if not self.position:
            raise Failure("there was no audio to send")

    async def pause(self, lost: Lost) -> None:
        """Wait before the next attempt; raise Failure if there should be none."""
        if self.fatal:
            raise Failure(self.fatal)
        if not self.id and lost.wait is None:
            raise Failure(f"no scribe at {self.options.uri}: {lost}")
        now = time.monotonic()
        if not self.attempts:
            self.deadline = now + self.options.retry_seconds
        if not self.options.resume or now >= self.deadline:
            raise Failure(f"connection lost: {lost}")
        backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self.attempts) * random.uniform(0.5, 1)
        seconds = min(max(backoff, lost.wait or 0), self.deadline - now)
        self.attempts += 1
        self.display.interim = ""
        self.display.note(f"No connection: {lost}. Trying again in {seconds:.1f} s.")
        await asyncio.sleep(seconds)

    def interrupt(self) -> None:
        """Ctrl-C: the first ends the input, and the last words still come; the second ends the program."""
        if self.interrupted:
            self.display.clear()
            os._exit(INTERRUPTED)
        self.interrupted = True
        self.audio.end()
        self.display.note("Waiting for the last words; Ctrl-C again stops at once.")

    def address(self) -> str:
        """The URI with the options of the wire, and with the session to take up again if there is one."""
        given = {name: getattr(self.options, name) for name in WIRE_OPTIONS}
        if self.options.resume:
            given["acks"] = "true"
        if self.id:
            given |= {"session": self.id, "after": max(self.display.segments, default=0)}
        uri = urlsplit(self.options.uri)
        query = parse_qsl(uri.query) + [(name, value) for name, value in given.items() if value is not None]
        return str(uri._replace(query=urlencode(query)).geturl())

    async def connect(self) -> None:
        """One connection, until `complete`; raises Lost or Failure."""
        token = self.options.token
        headers = {"Authorization": f"Bearer {token}"} if token else None
        try:
            async with connect(
                self.address(),
                additional_headers=headers,
                compression=None,
                proxy=None if urlsplit(self.options.uri).hostname in LOOPBACK else True,
                max_size=MAX_MESSAGE,
                close_timeout=CLOSE_SECONDS,
            ) as connection:
                tcp = connection.transport.get_extra_info("socket")
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
                await self.converse(connection)
        except InvalidStatus as error:
            raise refused(error.response) from None
        except ConnectionClosed as closed:
            raise Lost(str(closed.rcvd or closed.sent or "it broke off")) from None
        except (OSError, InvalidHandshake) as error:
            unreachable = "Connect call failed" in str(error)  # asyncio's words, once for each address
            raise Lost("nothing answers" if unreachable else str(error) or "no answer") from None
        except (WebSocketException, ValueError, ImportError) as error:  # the URI or a proxy is not usable
            raise Failure(str(error)) from None

    async def converse(self, connection: ClientConnection) -> None:
        """Send and receive until `complete`."""
        self.greeted = False
        async with asyncio.timeout(READY_SECONDS):
            while not self.greeted:
                self.take(await connection.recv())
        try:
            async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as group:
                sender = group.create_task(self.send(connection))
                while not self.complete:
                    self.take(await connection.recv())
                    if self.fatal:
                        sender.cancel()
                        patience.reschedule(asyncio.get_running_loop().time() + FATAL_SECONDS)
                sender.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def send(self, connection: ClientConnection) -> None:
        """Send from `position` to the end of the audio, then END. The receiver finds out why it cannot."""
        with suppress(ConnectionClosed):
            while chunk := await self.audio.read(self.position, self.options.chunk_size):
                await self.pace(self.position + len(chunk))
                await connection.send(chunk)
                self.position += len(chunk)
                self.show_position()
                if not self.options.resume:
                    self.audio.forget(self.position)
            self.sent_all = True
            await connection.send("END")

    async def pace(self, position: int) -> None:
        """With --realtime, wait until a recorder would have come so far. Always let the receiver run."""
        if not self.options.realtime or self.interrupted:
            await asyncio.sleep(0)
            return
        if not self.audio.byte_rate:
            raise Failure(f"--realtime needs WAV or raw audio; for other files: {PACED_BY_FFMPEG}")
        self.began = self.began or time.monotonic()
        await asyncio.sleep(self.began + position / self.audio.byte_rate - time.monotonic())

    def show_position(self) -> None:
        """Tell the display how much was sent."""
        rate = self.audio.byte_rate
        self.display.sent = f"{self.position / rate:.1f} s" if rate else f"{self.position / 1000:.0f} kB"

    def take(self, data: str | bytes) -> None:
        """Take up one message of the server, as it was received."""
        try:
            self.handle(json.loads(data))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Failure(f"{self.options.uri} does not speak scribe's protocol: {data[:100]!r}") from None

    def handle(self, message: Message) -> None:
        """Act on one message."""
        match message["type"], message.get("status"):
            case "status", "ready":
                if self.id:
                    raise Failure("the server has begun a new session instead of resuming")
                self.id = message["session"]
                self.greeted = True
            case "status", "resumed":
                self.position = message["received"]
                self.show_position()
                self.display.note(f"Connected again; going on from {self.display.sent}.")
                self.greeted = True
            case "status", "complete":
                self.gaps = [f"{gap['start']:.1f} to {gap['end']:.1f} s" for gap in message["gaps"]]
                self.reasons = sorted({gap["reason"] for gap in message["gaps"] if gap.get("reason")})
                self.complete = message
            case "transcription", _:
                self.display.transcription(message)
            case "interim", _:
                self.display.interim = one_line(message["text"])
                self.display.interim_start = float(message["start"])
            case "error", _ if message.get("fatal"):
                self.fatal = message["message"]
            case ("error", _) | ("status", "degraded" | "finishing"):
                left = f" ({message['left']} left)" if "left" in message else ""
                self.display.note(f"{message['message']}{left}")
        if message.get("received", 0) > self.received:
            self.received = message["received"]
            self.audio.forget(self.received)
            self.attempts = 0


def refused(response: Response) -> Lost | Failure:
    """What an HTTP answer to the handshake means. Its body is the server's message, unless it is a page."""
    status = f"HTTP {response.status_code} {response.reason_phrase}"
    body = (response.body or b"").decode(errors="replace").strip()
    text = status if not body or body.startswith("<") else f"{body[:300]} ({status})"
    wait = response.headers.get("Retry-After")
    if response.status_code >= 500 or wait:
        return Lost(text, float(wait) if wait and wait.isdecimal() else None)
    return Failure(f"refused: {text}")


async def transcribe(options: argparse.Namespace) -> None:
    """Run one session; raise Failure if not everything was transcribed."""
    display = Display(options.output)
    session = Session(options, display)
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(session.interrupt))
    drawing = asyncio.create_task(display.keep_drawn())
    try:
        await session.run()
    finally:
        drawing.cancel()
        display.finish(session.complete)


def main() -> int:
    """Run the command line; return the exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or StringIO()  # None where the shell has closed it
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # better a question mark than no text
        setattr(sys, name, stream)
    options = parse_options()
    if not sys.stdout.isatty():
        options.interim = None  # it would not be shown, and it costs
    try:
        asyncio.run(transcribe(options))
    except Failure as failure:
        with suppress(OSError):
            print("client.py:", one_line(str(failure)), file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
