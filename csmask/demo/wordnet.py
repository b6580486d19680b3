"""Find WordNet's database files and read example sentences from them, with the standard library alone.

A line of ``data.noun`` or ``data.verb`` is one synset: its words, its pointers, then `` | definition; "example"; ...``.
The format is described in wndb(5WN), https://wordnet.princeton.edu/documentation/wndb5wn.

``python -m csmask.demo.wordnet`` prints where the database is and exits with 0, or says how to get it and exits with 1.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NEEDED_FILES = ("data.noun", "data.verb")

_FIXES = """\
WordNet's database files (data.noun, data.verb) were not found. Any one of these brings them:
  1. Debian or Ubuntu:  sudo apt-get install wordnet-base      (installs /usr/share/wordnet)
  2. NLTK:              pip install nltk && python -m nltk.downloader wordnet
  3. a copy you have:   export WNSEARCHDIR=/path/to/dict       (or WNHOME, the folder above dict)"""


class WordNetNotFoundError(FileNotFoundError):
    """No folder or archive with WordNet's database files; the message names the fixes."""


@dataclass(frozen=True)
class WordNet:
    """The place of a WordNet database.

    path: the folder with the database files, or a zip archive that holds them
    prefix: the folder inside the archive, "" for a plain folder
    """

    path: Path
    prefix: str = ""

    def read(self, name: str) -> str:
        """The text of one database file, such as ``data.noun``."""
        if self.path.is_dir():
            return (self.path / name).read_text(encoding="utf-8")
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(self.prefix + name).decode("utf-8")

    def __str__(self) -> str:
        return f"{self.path}{':' + self.prefix if self.prefix else ''}"


@dataclass(frozen=True)
class Example:
    """One example sentence with the word that it illustrates.

    sentence: as the gloss quotes it
    lemma: the word's base form, lower case
    start, end: where the word stands in the sentence, in characters
    """

    sentence: str
    lemma: str
    start: int
    end: int


def nltk_data_folders() -> list[Path]:
    """The folders in which NLTK looks for data, without importing it (https://www.nltk.org/data.html)."""
    folders = [Path(p) for p in os.environ.get("NLTK_DATA", "").split(os.pathsep) if p]
    folders.append(Path.home() / "nltk_data")
    folders += [Path(sys.prefix, *parts, "nltk_data") for parts in ((), ("share",), ("lib",))]
    if sys.platform.startswith("win"):
        folders += [Path(drive) / "nltk_data" for drive in ("C:/", "D:/", "E:/")]
        folders += [Path(os.environ["APPDATA"]) / "nltk_data"] if "APPDATA" in os.environ else []
    else:
        folders += [Path(p, "nltk_data") for p in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    nltk = sys.modules.get("nltk")
    if nltk is not None:  # imported, so the user may have added folders to nltk.data.path
        folders += [Path(p) for p in nltk.data.path if isinstance(p, str)]
    return list(dict.fromkeys(folders))


def _candidates() -> Iterator[Path]:
    """Folders and archives that may hold the database, in the order in which they are tried."""
    if "WNSEARCHDIR" in os.environ:
        yield Path(os.environ["WNSEARCHDIR"])
    if "WNHOME" in os.environ:
        yield Path(os.environ["WNHOME"], "dict")
        yield Path(os.environ["WNHOME"])
    for folder in nltk_data_folders():
        for name in ("wordnet", "wordnet31"):
            yield folder / "corpora" / name
            yield folder / "corpora" / f"{name}.zip"
    yield Path("/usr/share/wordnet")  # Debian's wordnet-base
    yield Path("/usr/local/WordNet-3.0/dict")  # where Princeton's own installer puts it


def _open(path: Path) -> WordNet | None:
    """The database at ``path``, or None if the files are not there."""
    if path.is_dir():
        return WordNet(path) if all((path / name).is_file() for name in NEEDED_FILES) else None
    if not path.is_file() or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    for prefix in sorted(name.removesuffix("data.noun") for name in names if name.endswith("data.noun")):
        if all(prefix + name in names for name in NEEDED_FILES):
            return WordNet(path, prefix)
    return None


def _download() -> str:
    """Let NLTK fetch WordNet into its own data folder; returns why that failed, or ""."""
    try:
        import nltk
    except ImportError:
        return "NLTK is not installed"
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20.0)
    try:
        done = nltk.download("wordnet", quiet=True, raise_on_error=False)
    except (OSError, ValueError) as error:
        return f"NLTK's downloader failed: {error}"
    finally:
        socket.setdefaulttimeout(timeout)
    return "" if done else "NLTK's downloader could not reach its server"


def find_wordnet(download: bool = False) -> WordNet:
    """The first WordNet database found.

    Looked at, in this order: ``WNSEARCHDIR`` and ``WNHOME`` (environment variables that WordNet defines), NLTK's data
    folders (``corpora/wordnet`` or ``corpora/wordnet.zip``), ``/usr/share/wordnet``.

    download: if nothing is found, ask NLTK's downloader
    Raises WordNetNotFoundError, whose text names three ways to get the database.
    """
    for attempt in range(2 if download else 1):
        reason = _download() if attempt else ""
        for candidate in _candidates():
            found = _open(candidate)
            if found is not None:
                return found
    raise WordNetNotFoundError(_FIXES + (f"\n({reason}.)" if reason else ""))


def s_form(lemma: str) -> str:
    """The regular form in -s, which is a noun's plural and a verb's third person alike: ``box -> boxes``."""
    if re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", lemma):
        return lemma + "es"
    if re.search(r"[^aeiou]y$", lemma):
        return lemma[:-1] + "ies"
    return lemma + "s"


def ambiguous_forms(lemma: str) -> set[str]:
    """The inflected forms that a noun and a verb share, so that only the sentence tells which it is.

    Forms in -ed and -ing are left out: their ending alone would answer the question.
    """
    return {lemma, s_form(lemma)}


def _synsets(data: str) -> Iterator[tuple[list[str], str]]:
    """The words and the gloss of each synset in the text of a data file; the licence lines start with a space."""
    for line in data.splitlines():
        fields, bar, gloss = line.partition(" | ")
        if not bar or line.startswith(" "):
            continue
        parts = fields.split()
        count = int(parts[3], 16)  # hexadecimal, then pairs of word and lex_id
        yield [parts[4 + 2 * i].lower() for i in range(count)], gloss


def _locate(sentence: str, forms: set[str]) -> tuple[int, int] | None:
    """Where the only occurrence of one of the forms stands as a whole word; None if there is none, or more."""
    found = [m.span() for m in re.finditer(r"[^\W_]+(?:['’-][^\W_]+)*", sentence) if m.group().lower() in forms]
    return found[0] if len(found) == 1 else None


def read_examples(wordnet: WordNet, pos: str) -> dict[str, list[Example]]:
    """Example sentences by lemma, in the order of the file.

    pos: ``"noun"`` or ``"verb"``
    Returns one list per lemma of the sentences that its own synsets quote and that contain it exactly once, as a whole
    word in a form that nouns and verbs share. Lemmas of several words, or with digits or capitals, are left out.
    """
    examples: dict[str, list[Example]] = {}
    for words, gloss in _synsets(wordnet.read(f"data.{pos}")):
        for sentence in re.findall(r'"([^"]+)"', gloss):
            sentence = " ".join(sentence.split())
            for lemma in words:
                span = _locate(sentence, ambiguous_forms(lemma)) if re.fullmatch(r"[a-z]+", lemma) else None
                if span is not None:
                    examples.setdefault(lemma, []).append(Example(sentence, lemma, *span))
    return examples


def main(argv: list[str] | None = None) -> int:
    """Print where WordNet is; 0 if it was found, else 1."""
    parser = argparse.ArgumentParser(prog="python -m csmask.demo.wordnet", description=main.__doc__)
    parser.add_argument("--download", action="store_true", help="if it is missing, ask NLTK's downloader")
    try:
        print(f"WordNet found: {find_wordnet(download=parser.parse_args(argv).download)}")
    except WordNetNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
