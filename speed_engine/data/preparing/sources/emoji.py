"""Emoji drawn from the font of Noto Color Emoji: real pictures that need no download.

The font holds bitmaps of 136 x 128 pixels; Unicode's ``emoji-test.txt`` lists the sequences and
their groups, which are the classes. Left out are:

    skin tones     a person in five tones is one drawing five times over; with them 2,142 of 3,650
                   pictures were people, and nearly every held-out one had a twin among the rest
    components     parts of emoji, no emoji
    what the font has no drawing of, and what looks exactly like an earlier one (flags)
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from speed_engine.data.preparing.source import Record, Source, digest
from speed_engine.runtime.checks import UserError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SEQUENCES = Path("/usr/share/unicode/emoji/emoji-test.txt")
SIDE = 136  # pixels of a picture; a drawing is 136 wide and 128 high
_STRIKE = 109  # the only size, in pixels per em, that the font's bitmaps have
_SKIN_TONES = {chr(code) for code in range(0x1F3FB, 0x1F400)}
_COMPONENTS = "Component"  # name of a group
_FLAG = "\U0001f1fa\U0001f1f3"  # two characters that shaping turns into one drawing
# OpenType's numbers of a font's names
_NAMES = {"font": 4, "font_version": 5, "copyright": 0, "licence": 13, "licence_url": 14}


class Sequence(NamedTuple):
    """One emoji as Unicode lists it."""

    text: str
    group: str
    name: str


class Emoji(Source):
    """Pictures of emoji on white.

    Args:
        font: NotoColorEmoji.ttf with bitmaps, as Debian has it.
        sequences: Unicode's emoji-test.txt.

    Raises:
        UserError: one of the files is missing or another, Pillow cannot shape text, or fonttools is
            missing; says what to install.
    """

    def __init__(self, font: Path = FONT, sequences: Path = SEQUENCES) -> None:
        for path in (font, sequences):
            if not path.is_file():
                raise UserError(
                    f"{path} does not exist; on Debian and Ubuntu: apt-get install "
                    "fonts-noto-color-emoji unicode-data"
                )
        self._font, facts = _open(font), _font_facts(font)
        text = sequences.read_text(encoding="utf-8")
        self._sequences = self._drawn(read_sequences(text))
        if not self._sequences:
            raise UserError(f"{sequences} lists no emoji that {font} has a drawing of.")
        self.classes = tuple(dict.fromkeys(sequence.group for sequence in self._sequences))
        self.metadata = {**facts, "unicode": _unicode_version(text)}
        content = hashlib.sha256(font.read_bytes()).hexdigest()
        self.identity = digest(("emoji", content, *self.classes), self._sequences)

    def __len__(self) -> int:
        return len(self._sequences)

    def name(self, i: int) -> str:
        """As Unicode calls it."""
        return f"emoji {self._sequences[i].name!r}"

    def read(self, i: int, channels: int) -> Record:
        """The drawing, centred on white, and its group."""
        sequence = self._sequences[i]
        picture = _draw(self._font, sequence.text)
        assert picture is not None, "checked when the source was opened"
        label = self.classes.index(sequence.group)
        return Record(picture.convert("L") if channels == 1 else picture, label)

    def _drawn(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those that the font has a drawing of, each drawing once."""
        first: dict[bytes, Sequence] = {}
        for sequence in sequences:
            picture = _draw(self._font, sequence.text)
            if picture is not None:
                first.setdefault(hashlib.sha256(picture.tobytes()).digest(), sequence)
        return list(first.values())


def read_sequences(text: str) -> list[Sequence]:
    """The emoji of an ``emoji-test.txt``: fully qualified, of no skin tone, no components.

    Lines are ``1F600 ; fully-qualified # 😀 E1.0 grinning face`` below ``# group: NAME``.
    """
    sequences: list[Sequence] = []
    group = ""
    for line in text.splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        codes, _, rest = line.partition(";")
        status, _, comment = rest.partition("#")
        if status.strip() != "fully-qualified" or group == _COMPONENTS:
            continue
        characters = "".join(chr(int(code, 16)) for code in codes.split())
        if not _SKIN_TONES.intersection(characters):
            sequences.append(Sequence(characters, group, comment.split(maxsplit=2)[-1]))
    return sequences


def _open(path: Path) -> ImageFont.FreeTypeFont:
    needed = "needed: that of Debian's fonts-noto-color-emoji"
    try:
        font = ImageFont.truetype(path, _STRIKE)
    except OSError as error:
        raise UserError(
            f"{path} is no font with bitmaps of {_STRIKE} pixels ({error}); {needed}."
        ) from error
    if font.getlength(_FLAG) != font.getlength(_FLAG[0]):
        raise UserError(
            f"{path}: a flag is not drawn as one picture; {needed}, Pillow from PyPI, which has "
            "raqm, and apt-get install libfribidi0"
        )
    return font


def _draw(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """136 x 136 pixels; None if the font has no drawing, or more than one."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    width, height = right - left, bottom - top
    if not 0 < width <= SIDE or not 0 < height <= SIDE:
        return None
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    corner = (SIDE - width) // 2 - left, (SIDE - height) // 2 - top
    ImageDraw.Draw(picture).text(corner, text, font=font, embedded_color=True)
    return picture


def _font_facts(path: Path) -> dict[str, str]:
    """Which font this is, and under which licence."""
    try:
        from fontTools.ttLib import TTFont
    except ImportError as error:
        raise UserError(
            f"the emoji need the library fonttools ({error}): pip install 'speed-engine[emoji]'."
        ) from error
    with TTFont(path, lazy=True) as font:
        return {fact: font["name"].getDebugName(number) or "" for fact, number in _NAMES.items()}


def _unicode_version(text: str) -> str:
    found = [line for line in text.splitlines() if line.startswith("# Version:")]
    return found[0].removeprefix("# Version:").strip() if found else ""
