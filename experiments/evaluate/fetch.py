"""The public bundle of CORE: nanochat's eval_bundle.zip, 22 tasks in the DCLM format."""

import shutil
import zipfile
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import urlopen

from ablab.core.errors import UserError
from ablab.core.interop.folder import refuse_existing
from ablab.core.store.files import writing
from ablab.experiments.evaluate.bundle import INDEX

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
SECONDS = 30.0  # without a byte


def fetch(folder: Path, url: str = URL) -> None:
    """Leave the bundle as `folder`, in one step.

    Raises UserError: the folder exists, no network, an archive that is damaged or no bundle.
    """
    refuse_existing(folder)
    with writing(folder):
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.absolute().parent, prefix=".bundle") as partial:
            archive = Path(partial) / "bundle.zip"
            _download(url, archive)
            _unpacked(archive, Path(partial) / "bundle", url).rename(folder)


def _download(url: str, archive: Path) -> None:
    try:
        with urlopen(url, timeout=SECONDS) as answer, open(archive, "wb") as file:  # noqa: S310  https, or a test's
            shutil.copyfileobj(answer, file)
    except (URLError, HTTPException, TimeoutError, ConnectionError) as flaw:
        why = getattr(flaw, "reason", None) or flaw
        raise UserError(
            f"cannot fetch {url}: {why!s:.100}; it needs a network, or unpack that file yourself "
            "and name its folder with --bundle"
        ) from None


def _unpacked(archive: Path, out: Path, url: str) -> Path:
    """The folder in the archive that holds the index."""
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(out)  # Python leaves out `..` and roots
    except (zipfile.BadZipFile, EOFError) as flaw:
        raise UserError(f"{url} gave no whole zip file ({flaw!s:.80}); try again") from None
    index = next(iter(sorted(out.rglob(INDEX))), None)
    if index is None:
        raise UserError(f"{url} holds no {INDEX}, so it is no bundle")
    return index.parent
