"""Send a recording, or audio as it is recorded, to scribe and print the text.

    python client.py --mic
    python client.py audio.wav
    python client.py *.wav --output srt
    python client.py audio.wav --load 20
    ffmpeg -i talk.mp4 -f s16le -ar 16000 -ac 1 - | python client.py - --format pcm_s16le

The text of one file goes to standard output; beside each of several a NAME.txt (or .srt ...) is written.
The exit code is 0 only if everything was transcribed. Otherwise the last line on stderr says why not.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///

from __future__ import annotations

import argparse
import asyncio
import collections
import glob
import html
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from io import FileIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO
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


class Unserved(Failure):
    """The server takes no session at all, so that another file would fare no better."""


class Lost(Exception):
    """The connection failed in a way that may pass. `wait`: seconds the server asks for (Retry-After)."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


# Options. Those of the wire have the wire's names, and only those given are sent: defaults, checks and their
# messages are the server's.

WIRE_OPTIONS = ("format", "rate", "channels", "language", "prompt", "task", "interim", "words")
MAX_CHUNK = 2**20  # bytes; the server takes no longer message
MAX_JOBS, MAX_CLIENTS = 100, 10_000


def one_to(most: int) -> Callable[[str], int]:
    """What reads a number from 1 on."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"must be a number from 1 to {most}, not {text!r}")
        return int(text)

    return parse


def command_line() -> argparse.ArgumentParser:
    """All that can be asked for."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=style)
    add = parser.add_argument
    add("audio", nargs="*", help="files, or - for standard input")
    add("--mic", action="store_true", help="listen to the microphone until Ctrl-C")
    add("--device", metavar="NAME", help="another microphone, by the name that the recorder has for it")
    add("--uri", default="ws://localhost:8000/ws", help="the server (default: %(default)s)")
    add("--token", default=os.environ.get("SCRIBE_TOKEN"), help="access token (default: $SCRIBE_TOKEN)")
    add("--output", choices=("txt", "srt", "vtt", "json"), default="txt", help="default: txt, as it comes")
    add("--save", metavar="FILE", help="keep what comes from the microphone or a pipe; raw audio as WAV")
    add("--force", action="store_true", help="write over files that exist")
    add("--jobs", type=one_to(MAX_JOBS), default=4, metavar="N", help="files at once (default: %(default)s)")
    add("--load", type=one_to(MAX_CLIENTS), metavar="N", help="be N clients of a file at once; print delays")
    add("--chunk-size", type=one_to(MAX_CHUNK), default=4096, metavar="BYTES", help="default: %(default)s")
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
    add("--words", action=argparse.BooleanOptionalAction, help="ask for word times (default: srt and vtt do)")
    return parser


def expanded(names: Sequence[str]) -> list[str]:
    """Names of files, each once; patterns that no shell has expanded, as on Windows, are expanded here."""
    found: list[str] = []
    for name in names:
        found += (not Path(name).exists() and sorted(glob.glob(name))) or [name]  # noqa: PTH207
    return list(dict.fromkeys(found))


def parse_options() -> argparse.Namespace:
    """The command line; a wrong one ends the program with exit code 2, as argparse does."""
    parser = command_line()
    options = parser.parse_intermixed_args()
    options.audio = names = expanded(options.audio)
    several, file = len(names) > 1, len(names) == 1 and "-" not in names
    wrong = (
        (options.mic == bool(names), "say what to transcribe: files, - for standard input, or --mic"),
        (several and "-" in names, "- (standard input) stands alone: send the files in another run"),
        (options.mic and options.format, "--mic chooses its format itself: leave --format out"),
        (options.device and not options.mic, "--device names a microphone: give --mic too"),
        (options.load and not file, "--load needs one file, which every client reads for itself"),
        (options.save and (several or options.load), "--save is for one pipe or microphone: leave it out"),
    )
    for is_so, message in wrong:
        if is_so:
            parser.error(message)
    if options.mic:
        raw = ("pcm_s16le", options.rate or 16000, options.channels or 1)
        options.format, options.rate, options.channels = raw
    wanted = options.output in ("srt", "vtt") if options.words is None else options.words
    options.words = "true" if wanted else None
    if not options.load and (several or not sys.stdout.isatty()):
        options.interim = None  # it would not be shown, and it costs
    return options


# Audio. A source gives the bytes from any position that the server has not acknowledged yet, so that a
# resumed session goes on where the server stands. A regular file is simply read again. Of a pipe, what is not
# acknowledged is kept, up to a limit; beyond it the pipe is not read, and whoever writes to it waits.

KEEP_BYTES = 2**25  # of a pipe: 17 minutes at 16 kHz, 3 at 48 kHz stereo; more than --retry-seconds
READ_BYTES = 2**16  # all that a pipe holds on Linux
HEAD_BYTES = 2**12  # of a stream, where WAV tells its rate
RAW = {"pcm_s16le": (1, 2), "pcm_f32le": (3, 4), "mulaw": (7, 1), "alaw": (6, 1)}  # tag of WAV, sample bytes
UNKNOWN_SIZE = 2**32 - 1  # in a WAV header: to the end of the file


def wav_byte_rate(head: bytes) -> int | None:
    """Bytes per second, from the `fmt ` chunk of a WAV file; None if `head` has none."""
    if head[:4] not in (b"RIFF", b"RF64") or head[8:12] != b"WAVE":
        return None
    at = 12
    while head[at : at + 4] not in (b"fmt ", b""):
        size = int.from_bytes(head[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return int.from_bytes(head[at + 16 : at + 20], "little") or None


def wav_header(options: argparse.Namespace, size: int = UNKNOWN_SIZE) -> bytes:
    """What makes so many bytes of raw audio a WAV file; nothing if the audio is not raw."""
    if options.format not in RAW:
        return b""
    tag, width = RAW[options.format]
    channels, rate = options.channels or 1, options.rate or 16000
    block = channels * width
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, 8 * width)
    form += bytes(0 if tag == 1 else 2)  # the size of an extension, which only plain PCM may leave out
    whole = min(UNKNOWN_SIZE, 20 + len(form) + size + size % 2)
    sizes = (b"RIFF", whole, b"WAVEfmt ", len(form), form, b"data", min(UNKNOWN_SIZE, size))
    return struct.pack(f"<4sI8sI{len(form)}s4sI", *sizes)


class Keeper:
    """Keeps audio in a file as it comes in. A WAV header can be read at any time, and is exact at the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.size = 0
        self.shortfall = ""
        try:
            header = wav_header(options)
            self.file = Path(options.save).open("wb" if options.force else "xb")  # noqa: SIM115
        except FileExistsError:
            raise Failure(f"{options.save} exists: name another file, or give --force to lose it") from None
        except (OSError, ValueError, struct.error) as error:  # of the name, or of a rate that is no rate
            raise Failure(f"cannot write {options.save}: {reason(error)}") from None
        self._write(header)

    def _write(self, data: bytes) -> None:
        try:
            self.file.write(data)
            self.file.flush()
        except OSError as error:
            self.shortfall = f"{self.options.save} lacks the end of the audio: {reason(error)}"

    def keep(self, data: bytes) -> None:
        """Add what has come in. A disk that is full does not end the transcription."""
        if not self.shortfall:
            self._write(data)
            self.size += len(data)

    def close(self) -> None:
        """Set the header right. Where nothing was recorded no file is left."""
        if header := wav_header(self.options, self.size):
            self.keep(bytes(self.size % 2))
            with suppress(OSError):
                self.file.seek(0)
                self.file.write(header)
        with suppress(OSError):
            self.file.close()
            if not self.size and Path(self.options.save).is_file():
                Path(self.options.save).unlink()


class Audio:
    """A source. `shortfall` says why not all of it was sent or kept."""

    shortfall = ""
    byte_rate: int | None = None  # None: only a decoder could tell

    def begin(self) -> str:
        """The server is ready. What the user has to know now, if anything."""
        return ""

    async def read(self, position: int, size: int) -> bytes:
        """Up to `size` bytes as soon as there are any; none at the end."""
        raise NotImplementedError

    def forget(self, received: int) -> None:
        """The server has this many bytes for good."""

    def end(self) -> None:
        """Stop after what was read already."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing more is read."""


class FileAudio(Audio):
    """A regular file from its current offset on."""

    def __init__(self, file: FileIO, byte_rate: int | None) -> None:
        self.file = file
        self.base = file.tell()
        self.size = os.fstat(file.fileno()).st_size - self.base
        self.reached = 0  # the furthest position read
        if self.size <= 0:
            raise Failure("the file is empty")
        self.byte_rate = byte_rate or wav_byte_rate(file.read(HEAD_BYTES))

    async def read(self, position: int, size: int) -> bytes:
        try:
            self.file.seek(self.base + position)
            chunk = self.file.read(max(0, min(size, self.size - position)))
        except OSError as error:
            self.shortfall = f"cannot read the file beyond byte {position}: {reason(error)}"
            self.size, chunk = position, b""
        self.reached = max(self.reached, position + len(chunk))
        return chunk

    def end(self) -> None:
        if self.reached < self.size:
            self.shortfall = f"stopped after {self.reached} of {self.size} bytes"
            self.size = self.reached

    def close(self) -> None:
        self.file.close()


class PipeAudio(Audio):
    """A pipe, a device or a terminal, read by a thread that may block for ever and yet not hold up the exit.

    The thread hands each block to the event loop, to which all else belongs, and waits for room.
    """

    def __init__(self, byte_rate: int | None, keeper: Keeper | None = None) -> None:
        self.byte_rate = byte_rate
        self.keeper = keeper
        self.kept = bytearray()  # read and not acknowledged
        self.start = 0  # position of its first byte
        self.ended = False
        self.arrived = asyncio.Event()
        self.room = threading.Event()

    def pump(self, file: FileIO) -> None:
        """Begin to read."""
        pumping = (file, asyncio.get_running_loop())
        threading.Thread(target=self._pump, args=pumping, daemon=True).start()

    def _pump(self, file: FileIO, loop: asyncio.AbstractEventLoop) -> None:
        with suppress(RuntimeError):  # the loop is closed: the program ends
            try:
                while data := os.read(file.fileno(), READ_BYTES):
                    self.room.clear()
                    loop.call_soon_threadsafe(self._take, data)
                    self.room.wait()
            except OSError as error:
                self.shortfall = f"cannot read the input any further: {reason(error)}"
            loop.call_soon_threadsafe(self._end)

    def _take(self, data: bytes) -> None:
        if self.ended:
            return
        self.kept += data
        if self.keeper:
            self.keeper.keep(data)
        if not self.start:
            self.byte_rate = self.byte_rate or wav_byte_rate(bytes(self.kept[:HEAD_BYTES]))
        self.arrived.set()
        self.forget(self.start)

    def _end(self) -> None:
        self.ended = True
        self.arrived.set()

    async def read(self, position: int, size: int) -> bytes:
        if not self.start <= position <= self.start + len(self.kept):
            raise Failure(f"cannot go on from byte {position}, where the server stands: it is not kept")
        while position == self.start + len(self.kept) and not self.ended:
            self.arrived.clear()
            await self.arrived.wait()
        at = position - self.start
        return bytes(self.kept[at : at + size])

    def forget(self, received: int) -> None:
        del self.kept[: max(0, received - self.start)]
        self.start = max(self.start, received)
        if len(self.kept) < KEEP_BYTES:
            self.room.set()

    def end(self) -> None:
        self._end()

    def close(self) -> None:
        self._end()
        if self.keeper:
            self.keeper.close()
            self.shortfall = self.shortfall or self.keeper.shortfall


# Microphone. Each system has its recorders; the first that is installed writes raw audio into a pipe. It runs
# apart from our terminal, where Ctrl-C would end it at once: it is told to stop, and its last bytes are read.

STOP_SECONDS = 2  # for a recorder to hand over its last bytes
FORM = "-ac {channels} -ar {rate} -f s16le -flush_packets 1 -"  # of ffmpeg
RECORDERS = {  # their arguments, and what they call the usual microphone; sox knows another by AUDIODEV only
    "arecord": ("-q -t raw -f S16_LE -r {rate} -c {channels} -D {device}", "default"),
    "parecord": (
        "--raw --format=s16le --rate={rate} --channels={channels} --latency-msec=50 --device={device}",
        "@DEFAULT_SOURCE@",
    ),
    "sox": ("-q -d -t raw -r {rate} -c {channels} -b 16 -e signed-integer -L -", ""),
    "ffmpeg": (f"-loglevel error -f alsa -i {{device}} {FORM}", "default"),
}
FFMPEG = {  # where nothing else is looked for
    "darwin": (f"-loglevel error -f avfoundation -i :{{device}} {FORM}", "default"),
    "win32": (f"-loglevel error -f dshow -audio_buffer_size 50 -i audio={{device}} {FORM}", ""),
}
INSTALL = {"darwin": "ffmpeg (brew install ffmpeg)", "win32": "ffmpeg (winget install ffmpeg)"}
INSTALL_ON_UNIX = "one of arecord (package alsa-utils), parecord (pulseaudio-utils), sox and ffmpeg"
DSHOW = r'"([^"\n]+)" \(audio\)|audio devices\s*\n[^"\n]*"([^"\n]+)"'  # ffmpeg's lists, new and old


def first_microphone() -> str:
    """The name of one on Windows, where the usual one has none of its own."""
    listing = ("ffmpeg", "-hide_banner", "-list_devices", "true", "-f", "dshow", "-i", "dummy")
    listed = subprocess.run(listing, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if not (found := re.search(DSHOW, listed.stderr.decode(errors="replace"))):
        raise Failure("Windows knows no microphone: connect one, or allow its use in the privacy settings")
    return found[1] or found[2]


def recorder(options: argparse.Namespace) -> list[str]:
    """The command of the first recorder that is installed; it writes raw audio to standard output."""
    known = {"ffmpeg": FFMPEG[sys.platform]} if sys.platform in FFMPEG else RECORDERS
    if not (name := next(filter(shutil.which, known), None)):
        raise Failure(f"--mic needs a recorder: install {INSTALL.get(sys.platform, INSTALL_ON_UNIX)}")
    arguments, usual = known[name]
    device = options.device or usual
    if sys.platform == "win32":
        device = device or first_microphone()
    values = {"rate": options.rate, "channels": options.channels, "device": device}
    return [name, *(argument.format_map(values) for argument in arguments.split())]


class Microphone(PipeAudio):
    """What a recorder writes, from the moment when the server is ready until it is told to stop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.command = recorder(options)
        self.environment = {**os.environ, **({"AUDIODEV": options.device} if options.device else {})}
        super().__init__(2 * options.rate * options.channels, Keeper(options) if options.save else None)
        self.recorder: subprocess.Popen[bytes] | None = None
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115 - a pipe that nobody reads could block it
        self.stopping = False

    def begin(self) -> str:
        """Start the recorder, once."""
        if self.recorder or self.stopping:
            return ""
        pipe, group = subprocess.PIPE, getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # of Windows
        try:
            self.recorder = subprocess.Popen(
                self.command, bufsize=0, stdin=pipe, stdout=pipe, stderr=self.complaints,
                start_new_session=True, creationflags=group, env=self.environment,
            )  # fmt: skip
        except OSError as error:
            raise Failure(f"cannot start {self.command[0]}: {reason(error)}") from None
        assert isinstance(self.recorder.stdout, FileIO)
        self.pump(self.recorder.stdout)
        return f"Listening with {self.command[0]}; Ctrl-C ends."

    def end(self) -> None:
        """Tell the recorder to stop; what it has still to say is read to its end."""
        self.stopping = True
        if not self.recorder:
            self._end()
            return
        asyncio.get_running_loop().call_later(STOP_SECONDS, self._give_up, self.recorder)
        if sys.platform != "win32":
            self.recorder.terminate()
        elif self.recorder.stdin:  # a process can only be killed there, but ffmpeg takes a q
            with suppress(OSError):
                self.recorder.stdin.write(b"q")

    def _give_up(self, recorder: subprocess.Popen[bytes]) -> None:
        if recorder.poll() is None:
            recorder.kill()
            self._end()

    def _end(self) -> None:
        if not self.stopping and not self.ended:
            self.complaints.seek(0)
            said = [one_line(line) for line in self.complaints.read().decode(errors="replace").split("\n")]
            last = next((line for line in reversed(said) if line), "it does not say why")
            why = f"{self.command[0]} has stopped recording: {last}"
            self.shortfall = f"{why}; --device NAME chooses another microphone"
        super()._end()

    def close(self) -> None:
        self.stopping = True
        if self.recorder:
            self.recorder.kill()
        super().close()


def open_audio(options: argparse.Namespace, name: str) -> Audio:
    """A file, or standard input; raises Failure."""
    width = RAW[options.format][1] if options.format in RAW else 0
    byte_rate = width * (options.rate or 16000) * (options.channels or 1) or None
    try:
        file = FileIO(0, closefd=False) if name == "-" else FileIO(name)
        regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
        if regular and not options.save:
            return FileAudio(file, byte_rate)
    except (OSError, ValueError, Failure) as error:  # ValueError: a null byte in the name
        raise Failure(f"cannot read {name}: {reason(error)}") from None
    if regular:
        raise Failure(f"{name} is a file already, which --save would only copy: leave --save out")
    pipe = PipeAudio(byte_rate, Keeper(options) if options.save else None)
    pipe.pump(file)
    return pipe


def reason(error: Exception) -> str:
    """What the system says, without its numbers."""
    return getattr(error, "strerror", None) or str(error)


# Subtitles. A text is taken as units between which a line may break, each with its time, and cut into cues of
# two lines where that costs least, over the whole text: at the ends of sentences rather than at commas, and
# there rather than elsewhere; in few cues rather than many, and in none that is too short to be read.

LINE_COLUMNS, LINES = 42, 2
SHORTEST, LONGEST = 1.0, 7.0  # seconds of a cue
SILENCE = 1.0  # seconds: no cue spans so long a silence, for it would tell what is not yet said
PAUSE = 0.3  # seconds: as good a place to break as a comma
SENTENCE_ENDS, CLAUSE_ENDS = ".!?…。！？", ",;:–—、，；："
QUOTES = "\"'”’»)]」』）】"  # that may follow a stop
AT_CLAUSE, AT_WORD, TOO_SHORT, FULL = 0.5, 2.0, 3.0, 0.5  # costs, where that of a cue is 1
SPACELESS = re.compile("[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]")  # Han, kana


def columns(text: str) -> int:
    """The width of a text: East Asian characters take two columns, and accents none."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


class Unit(NamedTuple):
    """A word, or a character of a script that has no spaces, with its punctuation; times in seconds."""

    text: str
    spaced: bool  # from the unit in front
    start: float
    end: float


class Cue(NamedTuple):
    """What is shown at a time."""

    start: float
    end: float
    text: str


def may_break(before: str, after: str) -> bool:
    """Whether a line may break between two characters without a space between them."""
    opening = ("Ps", "Pi")
    if unicodedata.category(before) in opening:
        return False
    if unicodedata.category(after) in opening:
        return bool(SPACELESS.match(before))
    return after.isalnum() and bool(SPACELESS.match(before) or SPACELESS.match(after))


def times_by_words(text: str, words: Sequence[Message]) -> dict[int, tuple[float, float]]:
    """When characters are said, by their index; the words may be spelled otherwise, or of another text."""
    said: list[tuple[str, float, float]] = []
    for word in words:
        letters = [letter for letter in word["word"].casefold() if letter.isalnum()]
        step = (word["end"] - word["start"]) / max(1, len(letters))
        times = (word["start"] + step * n for n in range(len(letters)))
        said += [(letter, at, at + step) for letter, at in zip(letters, times, strict=True)]
    written = [(index, letter.casefold()) for index, letter in enumerate(text) if letter.isalnum()]
    spelled = ([letter for _, letter in written], [letter for letter, _, _ in said])
    blocks = SequenceMatcher(None, *spelled, autojunk=False).get_matching_blocks()
    if 2 * sum(block.size for block in blocks) < len(written):
        return {}
    pairs = ((written[a + n][0], said[b + n][1:]) for a, b, size in blocks for n in range(size))
    return dict(pairs)


def times_of(text: str, segment: Message) -> list[tuple[float, float]]:
    """When each character is said: as the words tell, and evenly in between and where there are none."""
    at, end = segment["start"], max(segment["start"], segment["end"])
    known = times_by_words(text, segment.get("words") or ())
    times: list[tuple[float, float]] = []
    for index, (first, last) in [*known.items(), (len(text), (end, end))]:
        first = min(max(first, at), end)
        missing = index - len(times)
        step = (first - at) / max(1, missing)
        times += [(at + step * n, at + step * (n + 1)) for n in range(missing)]
        at = min(max(last, first), end)
        times.append((first, at))
    return times


def units_of(segment: Message) -> Iterator[Unit]:
    """The units of a segment. What has no letters, as a dash, has the time of what is behind it."""
    text = one_line(segment["text"])
    times = times_of(text, segment)
    letters = [n for n, letter in enumerate(text) if letter.isalnum()] or range(len(text))
    for word in re.finditer(r"\S+", text):
        inside = range(word.start() + 1, word.end())
        edges = [word.start(), *(n for n in inside if may_break(text[n - 1], text[n])), word.end()]
        for begin, end in itertools.pairwise(edges):
            first, last = bisect_left(letters, begin), bisect_left(letters, end) - 1
            start = times[letters[first]][0] if first < len(letters) else times[letters[last]][1]
            yield Unit(text[begin:end], begin == word.start(), start, max(start, times[letters[last]][1]))


class Subtitles:
    """Cues of units. All text is in them once and in order, and no two overlap."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self.edges = [0, *itertools.accumulate(columns(unit.text) + unit.spaced for unit in units)]
        self.reach = list(range(len(units) + 1))  # from each unit: where the line is full
        at = 0
        for begin in range(len(units)):
            at = max(at, begin)
            while at < len(units) and self.width(begin, at + 1) <= LINE_COLUMNS:
                at += 1
            self.reach[begin] = at

    def width(self, begin: int, end: int) -> int:
        """Columns of the units, without the space in front."""
        return self.edges[end] - self.edges[begin] - self.units[begin].spaced

    def fits(self, begin: int, end: int) -> bool:
        """Whether a cue may hold these units; one unit alone it must."""
        first, second, last = self.units[begin], self.units[min(begin + 1, end - 1)], self.units[end - 1]
        if end == begin + 1:
            return True
        if second.start - first.end >= SILENCE or last.end - first.start > LONGEST:
            return False
        return self.reach[self.reach[begin]] >= end

    def break_cost(self, at: int) -> float:
        """What it costs to break in front of this unit."""
        before = self.units[at - 1]
        last = before.text.rstrip(QUOTES)[-1:]
        if at == len(self.units) or (last and last in SENTENCE_ENDS):
            return 0.0
        clause = (last and last in CLAUSE_ENDS) or self.units[at].start - before.end >= PAUSE
        return AT_CLAUSE if clause else AT_WORD

    def cost(self, begin: int, end: int) -> float:
        """What a cue of these units costs, with the break behind it; two half-full ones are the best two."""
        start = self.units[begin].start
        short = end < len(self.units) and self.units[end].start - start < SHORTEST
        fullness = self.width(begin, end) / (LINES * LINE_COLUMNS)
        return 1 + TOO_SHORT * short + FULL * fullness**2 + self.break_cost(end)

    def cuts(self) -> list[int]:
        """Where cues begin, and the end: the cheapest way through all places that fit."""
        best, back = [0.0], [0]
        for end in range(1, len(self.units) + 1):
            cheapest, source = math.inf, end - 1
            for begin in range(end - 1, -1, -1):
                if not self.fits(begin, end):
                    break
                if (cost := best[begin] + self.cost(begin, end)) < cheapest:
                    cheapest, source = cost, begin
            best.append(cheapest)
            back.append(source)
        found = [len(self.units)]
        while found[-1]:
            found.append(back[found[-1]])
        return found[::-1]

    def line(self, begin: int, end: int) -> str:
        """The units of one line."""
        return "".join(" " * unit.spaced + unit.text for unit in self.units[begin:end]).strip()

    def text(self, begin: int, end: int) -> str:
        """One line, or two of about the same length, better where a clause ends."""
        if self.width(begin, end) <= LINE_COLUMNS or end == begin + 1:
            return self.line(begin, end)

        def unevenness(at: int) -> float:
            upper, lower = self.width(begin, at), self.width(at, end)
            too_long = max(upper, lower) > LINE_COLUMNS
            return abs(upper - lower) / 4 + 2 * self.break_cost(at) + 1000 * too_long

        at = min(range(begin + 1, end), key=unevenness)
        return f"{self.line(begin, at)}\n{self.line(at, end)}"

    def cues(self) -> list[Cue]:
        """The cues. One that is short lasts on, or else begins before its words, as far as there is room."""
        found: list[Cue] = []
        free = 0.0  # when the cue in front ends
        for begin, end in itertools.pairwise(self.cuts()):
            start = max(free, self.units[begin].start)
            limit = self.units[end].start if end < len(self.units) else math.inf
            last = max(start, min(max(self.units[end - 1].end, start + SHORTEST), limit, start + LONGEST))
            start = max(free, min(start, last - SHORTEST))
            found.append(Cue(start, last, self.text(begin, end)))
            free = last
        return found


# Display. Text goes to stdout, messages to stderr. On a terminal there is also a live area below them: the
# unsettled text in grey, and lines of progress. It is drawn over itself in one write, so that it does not
# flicker, and taken away before anything else is written, as stdout and stderr may be the same terminal.

DRAW_SECONDS = 0.1
DIM, PLAIN, END_LINE, END_SCREEN, UP = "\x1b[2m", "\x1b[m", "\x1b[K", "\x1b[J", "\x1b[A"  # ECMA-48
CONTROLS = dict.fromkeys([*range(32), *range(127, 160)])  # what a terminal might obey
BAR, NAME = 20, 24  # columns
WORD = re.compile("[\u2e80-\u9fff]|[^\\W\u2e80-\u9fff]+(?:['’]\\w+)?")  # of Han and kana, a character


def one_line(text: str) -> str:
    """Text without line breaks and control characters."""
    return " ".join(text.split()).translate(CONTROLS)


def fit(text: str, width: int) -> str:
    """As much of the end of a text as fits."""
    for at in range(len(text) - 1, -1, -1):
        width -= columns(text[at])
        if width < 0:
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
    """A whole result as `txt`, `json`, `srt` or `vtt` (W3C WebVTT, in which `&`, `<` and `>` are markup)."""
    segments = closed(segments, complete.get("full_transcription", ""))
    if output == "txt":
        return "\n".join(one_line(segment["text"]) for segment in segments)
    if output == "json":
        kept = [{key: s[key] for key in s if key not in ("type", "received")} for s in segments]
        return json.dumps({**complete, "segments": kept}, ensure_ascii=False, indent=2)
    point = "," if output == "srt" else "."
    blocks = [] if output == "srt" else ["WEBVTT\n"]
    units = [unit for segment in segments for unit in units_of(segment)]
    for number, (start, end, text) in enumerate(Subtitles(units).cues(), 1):
        text, label = (text, f"{number}\n") if output == "srt" else (html.escape(text, quote=False), "")
        blocks.append(f"{label}{clock(start, point)} --> {clock(end, point)}\n{text}\n")
    return "\n".join(blocks).removesuffix("\n")


class Screen:
    """Standard output and error, with the live area of the sessions that go on."""

    def __init__(self) -> None:
        capable = os.environ.get("TERM") != "dumb"
        self.shows_interim = capable and sys.stdout.isatty()
        self.shows_progress = capable and sys.stderr.isatty()
        self.terminal = sys.stderr if self.shows_progress else sys.stdout
        self.live: list[Display | Load] = []
        self.drawn: list[str] = []
        if sys.platform == "win32":
            os.system("")  # has the side effect that the console obeys escape sequences

    def write(self, text: str, stream: TextIO) -> None:
        """Whole lines above the live area; raises Failure when stdout takes no more."""
        self.clear()
        try:
            print(text, file=stream, flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # for what is flushed at exit
            if stream is sys.stdout:
                raise Failure(f"cannot write the text: {reason(error)}") from None
        self.draw()

    def note(self, text: str) -> None:
        """A message to the user, apart from the text."""
        self.write(one_line(text), sys.stderr)

    def draw(self) -> None:
        """Bring the live area up to date."""
        if not (self.shows_interim or self.shows_progress):
            return
        size = os.get_terminal_size(self.terminal.fileno())
        lines = [line for display in self.live for line in display.lines((size.columns or 80) - 1)]
        lines = lines[-max(1, (size.lines or 24) - 1) :]
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


class Display:
    """What one session has told, the transcriptions by their sequence numbers; it is not shown (--load)."""

    def __init__(self) -> None:
        self.segments: dict[int, Message] = {}
        self.complete: Message = {}
        self.interim = ""
        self.interim_start = 0.0  # seconds
        self.sent = ""  # how much, for the progress
        self.transcribed = 0.0  # seconds
        self.words = 0

    def transcription(self, message: Message) -> None:
        """Take up a transcription; a resumed session may repeat some."""
        start, end, text = message["start"], message["end"], one_line(message["text"])
        if message["sequence"] in self.segments:
            return
        self.segments[message["sequence"]] = message
        self.transcribed = max(self.transcribed, end)
        self.words += len(WORD.findall(text))
        if self.interim_start < end:
            self.interim = ""
        if text:
            self.show(f"[late, {clock(start)} to {clock(end)}] {text}" if message.get("late") else text)

    def show(self, text: str) -> None:
        """New text, as it comes."""

    def note(self, text: str) -> None:
        """A message to the user."""

    def finishing(self, message: Message) -> None:
        """All is sent, and some parts are still left."""

    def lines(self, width: int) -> list[str]:
        """The live area."""
        return []

    def spoken(self) -> list[Message]:
        """The segments that have text, in their places: late ones may go in the middle."""
        return sorted((s for s in self.segments.values() if s["text"].strip()), key=lambda s: s["start"])

    def result(self, output: str) -> str:
        """All text in the form that was asked for."""
        return render(output, self.complete, self.spoken())


class TextDisplay(Display):
    """One session, whose text goes to standard output as it comes, or at the end if it has a form."""

    def __init__(self, screen: Screen, output: str) -> None:
        super().__init__()
        self.screen = screen
        self.output = output
        screen.live.append(self)

    def show(self, text: str) -> None:
        if self.output == "txt":
            self.screen.write(text, sys.stdout)

    def note(self, text: str) -> None:
        self.screen.note(text)

    def finishing(self, message: Message) -> None:
        self.note(f"{message['message']} ({message['left']} left)")

    def lines(self, width: int) -> list[str]:
        lines = []
        if self.screen.shows_interim and self.interim:
            lines.append(DIM + fit(self.interim, width) + PLAIN)
        if self.screen.shows_progress and self.sent:
            progress = f"{self.sent} sent, {self.transcribed:.1f} s transcribed, {self.words} words"
            lines.append(fit(progress, width))
        return lines

    def finish(self) -> None:
        """Take the live area away, and print what had to wait for the end."""
        self.screen.live.remove(self)
        self.screen.clear()
        if self.output != "txt" and (self.complete or self.spoken()):
            self.screen.write(self.result(self.output), sys.stdout)
        if (self.complete.get("archive") or {}).get("stored") is False:
            self.note("The recording is not in the archive yet (stored: false); the server goes on trying.")
        if self.screen.shows_progress and "usage" in self.complete:
            billed = self.complete["usage"].get("billed_seconds")
            self.note(f"{self.complete.get('duration', 0):.1f} s of audio, {billed} s billed.")


class FileDisplay(Display):
    """One of several files: a bar, and messages with the file's name in front."""

    def __init__(self, screen: Screen, name: str, audio: FileAudio) -> None:
        super().__init__()
        self.screen = screen
        self.name = name
        self.audio = audio
        self.left = ""

    def note(self, text: str) -> None:
        self.screen.note(f"{self.name}: {text}")

    def finishing(self, message: Message) -> None:
        self.left = f", {message['left']} left"

    def lines(self, width: int) -> list[str]:
        if not self.screen.shows_progress:
            return []
        rate, size = self.audio.byte_rate, max(1, self.audio.size)
        share = min(1.0, (self.transcribed * rate if rate else self.audio.reached) / size)
        done = (
            f" [{'#' * int(BAR * share):<{BAR}}] {share:4.0%}, {self.transcribed:.1f} s, {self.words} words"
        )
        room = max(1, min(NAME, width - len(done + self.left)))
        name = fit(self.name, room)
        return [name + " " * (room - columns(name)) + done + self.left]


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

    def __init__(self, options: argparse.Namespace, audio: Audio, display: Display) -> None:
        self.options = options
        self.audio = audio
        self.display = display
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
        self.late = 0.0  # seconds, the latest that --realtime sent

    async def run(self) -> None:
        """Return when everything is transcribed; raise Failure if it is not."""
        while not self.display.complete:
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
            raise Failure(
                "there was no audio to send: look after the microphone, or what writes into the pipe"
            )

    async def pause(self, lost: Lost) -> None:
        """Wait before the next attempt; raise Failure if there should be none."""
        if self.fatal:
            raise Failure(self.fatal)
        if not self.id and lost.wait is None:
            raise Unserved(f"no scribe at {self.options.uri}: {lost}; start one, or name another with --uri")
        now = time.monotonic()
        if not self.attempts:
            self.deadline = now + self.options.retry_seconds
        if not self.options.resume or now >= self.deadline:
            raise Failure(f"connection lost: {lost}; send all again when it is there")
        backoff = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self.attempts) * random.uniform(0.5, 1)
        seconds = min(max(backoff, lost.wait or 0), self.deadline - now)
        self.attempts += 1
        self.display.interim = ""
        self.display.note(f"No connection: {lost}. Trying again in {seconds:.1f} s.")
        await asyncio.sleep(seconds)

    def interrupt(self) -> None:
        """End the input; the last words still come."""
        self.interrupted = True
        self.audio.end()

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
            several = "Connect call failed" in str(error)  # asyncio's words, once for each address
            unreachable = several or isinstance(error, ConnectionRefusedError)
            raise Lost("nothing answers" if unreachable else str(error) or "no answer") from None
        except (WebSocketException, ValueError, ImportError) as error:  # the URI or a proxy is not usable
            raise Unserved(f"cannot use {self.options.uri}: {error}") from None

    async def converse(self, connection: ClientConnection) -> None:
        """Send and receive until `complete`."""
        self.greeted = False
        async with asyncio.timeout(READY_SECONDS):
            while not self.greeted:
                self.take(await connection.recv())
        if said := self.audio.begin():
            self.display.note(said)
        try:
            async with asyncio.timeout(None) as patience, asyncio.TaskGroup() as group:
                sender = group.create_task(self.send(connection))
                while not self.display.complete:
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
        early = self.began + position / self.audio.byte_rate - time.monotonic()
        self.late = max(self.late, -early)
        await asyncio.sleep(early)

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
                self.display.complete = message
            case "transcription", _:
                self.display.transcription(message)
            case "interim", _:
                self.display.interim = one_line(message["text"])
                self.display.interim_start = float(message["start"])
            case "error", _ if message.get("fatal"):
                self.fatal = message["message"]
            case "status", "finishing":
                self.display.finishing(message)
            case ("error", _) | ("status", "degraded" | "silent"):
                level = f" (level: {message['level']})" if "level" in message else ""
                self.display.note(message["message"] + level)
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
    return Unserved(f"refused: {text}")


# Runs. Of one session, of several files, or of many sessions to measure a server. Whatever runs, the first
# Ctrl-C ends all inputs, and the last words still come; the second ends the program.


class CtrlC:
    """What Ctrl-C does to the sessions that go on."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.sessions: set[Session] = set()
        self.pressed = asyncio.Event()

    def press(self) -> None:
        """Ctrl-C was pressed."""
        if self.pressed.is_set():
            self.screen.clear()
            for session in self.sessions:
                session.audio.close()
            os._exit(INTERRUPTED)
        self.pressed.set()
        for session in self.sessions:
            session.interrupt()
        self.screen.note("Waiting for the last words; Ctrl-C again stops at once.")

    async def run(self, session: Session) -> None:
        """Run a session to its end; raises Failure if not everything was transcribed."""
        self.sessions.add(session)
        try:
            await session.run()
        finally:
            self.sessions.remove(session)
            session.audio.close()
        if session.audio.shortfall:
            raise Failure(session.audio.shortfall)


async def run_one(options: argparse.Namespace, screen: Screen, ctrl_c: CtrlC) -> None:
    """One file, pipe or microphone; its text goes to standard output."""
    audio = Microphone(options) if options.mic else open_audio(options, options.audio[0])
    display = TextDisplay(screen, options.output)
    try:
        await ctrl_c.run(Session(options, audio, display))
    finally:
        display.finish()


class Files:
    """Several files, some at a time; NAME.txt, .srt, .vtt or .json is written beside each that is whole.

    What there is of another goes to NAME.partial.txt, so that the next run does not take it for whole.
    """

    def __init__(self, options: argparse.Namespace, screen: Screen, ctrl_c: CtrlC) -> None:
        self.options = options
        self.screen = screen
        self.ctrl_c = ctrl_c
        self.failed: list[str] = []
        self.skipped = 0
        self.total = collections.Counter[str]()
        self.unserved = False

    def written(self, name: str, part: str = "") -> Path:
        """Where the text of a file goes."""
        path = Path(name)
        return path.parent / f"{path.stem}{part}.{self.options.output}"

    def check(self) -> None:
        """Raise Failure if a text would be written over another, or over what is to be read."""
        paths: dict[str, str] = {os.path.normcase(Path(name).absolute()): "" for name in self.options.audio}
        for name in self.options.audio:
            path = self.written(name)
            other = paths.setdefault(os.path.normcase(path.absolute()), name)
            if not other:
                raise Failure(f"{path} is to be read, and would be written over: leave it out, or move it")
            if other != name:
                raise Failure(f"{other} and {name} would both be written to {path}: rename one of them")

    async def run(self) -> None:
        """All files; raises Failure if not everything was transcribed."""
        self.check()
        names = iter(self.options.audio)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.options.jobs):
                group.create_task(self.work(names))
        self.screen.note(self.summary())
        if self.failed:
            shown, more = self.failed[:5], len(self.failed) - 5
            raise Failure(f"not transcribed: {', '.join(shown)}{f' and {more} more' if more > 0 else ''}")

    async def work(self, names: Iterator[str]) -> None:
        """One file after the other, until there are no more."""
        for name in names:
            if self.ctrl_c.pressed.is_set() or self.unserved:
                self.failed.append(name)
            elif self.written(name).exists() and not self.options.force:
                self.skipped += 1
                self.screen.note(f"{name}: kept {self.written(name)}, which exists; --force writes it anew.")
            else:
                await self.transcribe(name)

    async def transcribe(self, name: str) -> None:
        """One file; a line says what has come of it."""
        try:
            audio = open_audio(self.options, name)
            if not isinstance(audio, FileAudio):
                raise Failure(f"{name} is no regular file: transcribe it alone")
            if not os.access(path := self.written(name).absolute().parent, os.W_OK):
                raise Failure(f"cannot write into {path}: copy {name} to another directory")
        except Failure as failure:
            return self.fail(name, str(failure))
        display = FileDisplay(self.screen, name, audio)
        self.screen.live.append(display)
        try:
            await self.ctrl_c.run(Session(self.options, audio, display))
            said = self.write(self.written(name), display)
            self.written(name, ".partial").unlink(missing_ok=True)
            self.screen.note(f"{name}: {said}.")
        except Failure as failure:
            self.unserved = self.unserved or isinstance(failure, Unserved)
            self.fail(name, f"{name}: {failure}{self.rest(name, display)}")
        finally:
            self.screen.live.remove(display)
            self.add(display)
        return None

    def rest(self, name: str, display: FileDisplay) -> str:
        """Write what there is of a text; returns what to say of it, behind why it is not all."""
        try:
            return f"; {self.write(self.written(name, '.partial'), display)}" if display.spoken() else ""
        except Failure as failure:
            return f"; {failure}"

    def write(self, path: Path, display: FileDisplay) -> str:
        """Write a text; returns what to say of it. The file is there whole or not at all."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            text = display.result(self.options.output)
            temporary.write_text(f"{text}\n", encoding="utf-8", newline="\n")
            temporary.replace(path)
        except OSError as error:
            raise Failure(f"cannot write {path}: {reason(error)}") from None
        finally:
            with suppress(OSError):
                temporary.unlink()
        return f"{display.words} words are in {path}"

    def fail(self, name: str, why: str) -> None:
        """Say why a file is not transcribed."""
        self.failed.append(name)
        self.screen.note(f"{why.removesuffix('.')}.")

    def add(self, display: Display) -> None:
        """Add up what a session was told at its end."""
        usage = display.complete.get("usage", {})
        self.total["audio"] += display.complete.get("duration", 0)
        self.total["billed"] += usage.get("billed_seconds", 0)
        self.total["silent"] += usage.get("silent_seconds", 0)
        self.total["words"] += display.words
        self.total["gaps"] += len(display.complete.get("gaps", ()))
        self.total["open"] += bool(display.sent and not usage)

    def summary(self) -> str:
        """What all files came to."""
        total, given = self.total, len(self.options.audio)
        whole = given - self.skipped - len(self.failed)
        files = f"{whole} of {given} files transcribed, {self.skipped} skipped, {len(self.failed)} failed"
        least = "at least " if total["open"] else ""  # it is not known what a session without an end cost
        spent = f"{total['audio']:.1f} s of audio, {total['silent']:.1f} s of it silent"
        found = f"{least}{total['billed']} s billed, {total['words']} words, {total['gaps']} gaps"
        return f"{files}: {spent}, {found}."


# Load. First the file alone, in real time, to compare with; then as many clients as are asked for. They begin
# one after the other, evenly over some seconds: at the same moment they would all pause at the same moment.

STAGGER_SECONDS = 10.0  # from the first to the last client, or the length of the file if it is shorter
HEADER_BYTES = 44  # of a WAV file, in front of its audio
LATE_SECONDS = 0.25  # of sending, from which on it is the client's machine that is measured
UNKNOWN_RATE = (
    "--load needs WAV or raw audio: convert the file first (ffmpeg -i FILE -ac 1 -ar 16000 audio.wav)"
)


class LoadSession(Session):
    """A session that measures, from the moment when the audio of a final was sent until the final came."""

    def __init__(self, options: argparse.Namespace, audio: Audio, display: Display) -> None:
        super().__init__(options, audio, display)
        self.positions: list[int] = []  # in bytes, and
        self.times: list[float] = []  # when so much had first been sent
        self.delays: list[float] = []
        self.failure = ""

    def show_position(self) -> None:
        if self.position > (self.positions[-1] if self.positions else 0):
            self.positions.append(self.position)
            self.times.append(time.monotonic())

    def handle(self, message: Message) -> None:
        new = message["type"] == "transcription" and message["sequence"] not in self.display.segments
        if new and self.times:
            end = message["end"] * (self.audio.byte_rate or 0) + HEADER_BYTES
            sent = min(bisect_left(self.positions, end), len(self.times) - 1)
            self.delays.append(time.monotonic() - self.times[sent])
        super().handle(message)

    def words(self) -> list[str]:
        """What was said, without case and punctuation."""
        return WORD.findall(" ".join(s["text"] for s in self.display.spoken()).casefold())


def lost_words(reference: Sequence[str], words: Sequence[str]) -> tuple[int, int]:
    """How many words of the reference are missing, and how many others stand in the place of one."""
    lost = changed = 0
    for kind, i, k, j, m in SequenceMatcher(None, reference, words, autojunk=False).get_opcodes():
        if kind in ("delete", "replace"):
            lost += max(0, (k - i) - (m - j))
            changed += min(k - i, m - j)
    return lost, changed


class Load:
    """Many clients that stream one file at once, and one that did so alone before."""

    HEADING = "         sessions  errors  finals  median s  95 % s  worst s  words   lost  changed"
    ROW = "{:9}{:8}{:8}{:8}{:>10}{:>8}{:>9}{:7}{:7}{:9}"

    def __init__(self, options: argparse.Namespace, screen: Screen, ctrl_c: CtrlC) -> None:
        self.options = argparse.Namespace(**{**vars(options), "realtime": True})
        self.screen = screen
        self.ctrl_c = ctrl_c
        self.sessions: list[LoadSession] = []

    def lines(self, width: int) -> list[str]:
        """The live area."""
        going, finals = len(self.ctrl_c.sessions), sum(len(session.delays) for session in self.sessions)
        return [fit(f"{going} of {len(self.sessions)} clients are at work, {finals} finals", width)]

    def session(self) -> LoadSession:
        """One client."""
        audio = open_audio(self.options, self.options.audio[0])
        if not isinstance(audio, FileAudio) or not audio.byte_rate:
            raise Failure(UNKNOWN_RATE)
        return LoadSession(self.options, audio, Display())

    async def client(self, session: LoadSession, wait: float) -> None:
        """Run one client, after a while."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self.ctrl_c.pressed.wait()
                session.failure = "not begun"
                return
        try:
            await self.ctrl_c.run(session)
        except Failure as failure:
            session.failure = str(failure)

    async def stream(self, number: int) -> list[LoadSession]:
        """So many clients at once."""
        self.sessions = sessions = [self.session() for _ in range(number)]
        audio = sessions[0].audio
        assert isinstance(audio, FileAudio)
        seconds = audio.size / (audio.byte_rate or 1)
        apart = min(STAGGER_SECONDS, seconds) / number
        how = "One client alone" if number == 1 else f"{number} clients, one every {apart:.2f} s"
        self.screen.note(f"{how}: {seconds:.0f} s.")
        self.screen.live.append(self)
        async with asyncio.TaskGroup() as group:
            for n, session in enumerate(sessions):
                group.create_task(self.client(session, n * apart))
        self.screen.live.remove(self)
        return sessions

    async def run(self) -> None:
        """Print the table; raises Failure if a client has failed."""
        (alone,) = await self.stream(1)
        if alone.failure:
            raise Failure(f"one client alone has failed already: {alone.failure}")
        sessions = await self.stream(self.options.load)
        rows = [self.row("alone", [alone], alone), self.row("at once", sessions, alone)]
        self.screen.write("\n".join((self.HEADING, *rows)), sys.stdout)
        if (late := max(session.late for session in sessions)) > LATE_SECONDS:
            self.screen.note(
                f"Audio was sent up to {late:.1f} s late: connections were lost, or we are too slow."
            )
        if self.ctrl_c.pressed.is_set():
            self.screen.note("Stopped by Ctrl-C: what was not sent any more counts as lost.")
        if failures := [session.failure for session in sessions if session.failure]:
            (first, times), *_ = collections.Counter(failures).most_common()
            raise Failure(f"{len(failures)} of {len(sessions)} clients failed; {times} of them: {first}")

    def row(self, name: str, sessions: Sequence[LoadSession], alone: LoadSession) -> str:
        """A line of the table: nearest ranks, and words in comparison with those of the client alone."""
        delays = sorted(delay for session in sessions for delay in session.delays)
        ranks = (delays[math.ceil(len(delays) * part) - 1] if delays else math.nan for part in (0.5, 0.95, 1))
        expected, errors = alone.words(), sum(bool(session.failure) for session in sessions)
        lost, changed = map(sum, zip(*(lost_words(expected, s.words()) for s in sessions), strict=True))
        times, words = (f"{rank:.2f}" for rank in ranks), len(expected) * len(sessions)
        return self.ROW.format(name, len(sessions), errors, len(delays), *times, words, lost, changed)


async def run(options: argparse.Namespace) -> None:
    """Do what the command line asks for; raises Failure if not everything was transcribed."""
    screen = Screen()
    ctrl_c = CtrlC(screen)
    loop = asyncio.get_running_loop()
    signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(ctrl_c.press))
    drawing = asyncio.create_task(screen.keep_drawn())
    try:
        if options.load:
            await Load(options, screen, ctrl_c).run()
        elif len(options.audio) > 1:
            await Files(options, screen, ctrl_c).run()
        else:
            await run_one(options, screen, ctrl_c)
    except ExceptionGroup as errors:  # of a task group, which has cancelled its other tasks
        raise errors.exceptions[0] from None
    finally:
        drawing.cancel()
        screen.clear()


def main() -> int:
    """Run the command line; return the exit code."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or StringIO()  # None where the shell has closed it
        if isinstance(stream, TextIOWrapper):
            # Better a question mark than no text; and where Windows writes into a file, all of the text.
            stream.reconfigure(encoding="utf-8" if sys.platform == "win32" else None, errors="replace")
        setattr(sys, name, stream)
    options = parse_options()
    try:
        asyncio.run(run(options))
    except Failure as failure:
        with suppress(OSError):
            print("client.py:", one_line(str(failure)), file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
