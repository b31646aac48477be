"""TensorBoard: STORE/tensorboard/EXPERIMENT/ARM · seed N/ holds the curves of a run, its settings and what it is.

    tensorboard --logdir STORE/tensorboard

A run's folder there is written anew whenever the run is opened, from its run folder: a killed run has no point twice.
Runs are sessions of the HParams page, those of one arm a group.  Final numbers that end no curve stand as final/KEY.
"""

import os
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ablab.core.store.planned import GridPlan
from ablab.core.store.result import FINISHED
from ablab.experiments.track.cards import started
from ablab.experiments.track.chosen import TENSORBOARD
from ablab.experiments.track.store_view import StoreView, file_name, finite, title_of
from ablab.experiments.track.tracker import Card

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

RECEIPT = "ablab.json"
EVENTS = "events.out.tfevents.*"
FLUSH_SECONDS = 5.0  # a point waits no longer for the disk


class TensorBoard(StoreView):
    """The folder STORE/tensorboard."""

    name = TENSORBOARD

    def connect(self) -> None:
        from tensorboard.summary.writer import record_writer  # noqa: F401

    def tracker(self) -> "TensorBoardTracker":
        return TensorBoardTracker(self)

    def folder(self, experiment: str) -> Path:
        return self.store.root / "tensorboard" / file_name(experiment)

    def run_folder(self, card: Card) -> Path:
        return self.folder(card.experiment) / file_name(title_of(card))

    def receipt_path(self, card: Card) -> Path:
        return self.run_folder(card) / RECEIPT

    def is_there(self, card: Card) -> bool:
        return any(self.run_folder(card).glob(EVENTS))

    def forget(self, plan: GridPlan, cards: Iterable[Card]) -> None:
        """Of folders with our receipt alone."""
        planned = {self.run_folder(card) for card in cards}
        for receipt in self.folder(plan.name).glob(f"*/{RECEIPT}"):
            if receipt.parent not in planned:
                shutil.rmtree(receipt.parent)


class EventFile:
    """A file that TensorBoard reads.

    Its own writer opens the file anew for each flush, and so would make one again that `ablab sync` of another process
    has replaced.
    """

    def __init__(self, folder: Path):
        from tensorboard.summary.writer.record_writer import RecordWriter

        unique = f"{time.time_ns():019d}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / EVENTS.replace("*", unique)
        self.file = self.path.open("wb")
        self.writer = RecordWriter(self.file)
        self.flushed_at = time.monotonic()

    def begin(self, when: float) -> None:
        """Its version; and a server that has read the old file drops what it knows from step 0 on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.add(Event(wall_time=when, file_version="brain.Event:2"))
        restart = SessionLog(status=SessionLog.START)
        self.add(Event(wall_time=when, step=0, session_log=restart))

    def add(self, event: "Event") -> None:
        self.writer.write(event.SerializeToString())
        if time.monotonic() - self.flushed_at > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self.file.flush()
        self.flushed_at = time.monotonic()

    def close(self) -> None:
        self.file.close()


class TensorBoardTracker:
    """One run: one file of events."""

    def __init__(self, view: TensorBoard):
        self.view = view

    def open(self, card: Card) -> None:
        self.card = card
        self.start = started(card.folder)
        self.step = -1
        self.seconds = 0.0
        self.latest: dict[str, float] = {}
        folder = self.view.run_folder(card)
        (folder / RECEIPT).unlink(missing_ok=True)
        for old in folder.glob(EVENTS):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        self.events = EventFile(folder)
        self.events.begin(self.start)
        self._add([_text("about", card.description), _session_start(card, self.start)])

    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if step <= self.step:  # the run folder told it before the runner did
            return
        self.step = step
        self.seconds = seconds
        known = finite(scalars)
        self.latest |= known
        self._add(Summary.Value(tag=key, simple_value=value) for key, value in known.items())

    def flush(self) -> None:
        self.events.flush()

    def leave(self) -> None:
        self.events.close()
        self.view.vouch(self.card, self.events.path)

    def close(self, status: str, summary: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(
            Summary.Value(tag=f"final/{key}", simple_value=value)
            for key, value in finite(summary).items()
            if self.latest.get(key) != value
        )
        self._add([_text("status", status), _session_end(status, self.start + self.seconds)])
        self.events.close()
        self.view.vouch(self.card, self.events.path)

    def _add(self, values: "Iterable[Summary.Value]") -> None:
        """At the step and the time of training that the run has reached."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        when = self.start + self.seconds
        told = Summary(value=list(values))
        self.events.add(Event(wall_time=when, step=max(self.step, 0), summary=told))


# -- summaries of TensorBoard's plugins: torch.utils.tensorboard writes the same ones, but imports torch ---------------
def _text(tag: str, text: str) -> "Summary.Value":
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.plugins.text.metadata import create_summary_metadata

    words = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
    about = create_summary_metadata(display_name=tag, description="")
    return Summary.Value(tag=tag, metadata=about, tensor=words)


def _session_start(card: Card, start: float) -> "Summary.Value":
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    # Seeds of an arm are a group; each trial of a study has settings of its own.
    group = title_of(card) if "ablab.trial" in card.tags else card.cell
    session = plugin_data_pb2.SessionStartInfo(group_name=group, start_time_secs=start)
    for name, value in {"arm": card.cell, **card.params}.items():
        if name == "seed":  # the page shows that of one session for the group
            continue
        held = session.hparams[name]
        if isinstance(value, bool):
            held.bool_value = value
        elif isinstance(value, (int, float)):
            held.number_value = value
        else:
            held.string_value = str(value)
    told = plugin_data_pb2.HParamsPluginData(session_start_info=session)
    return _of_hparams(metadata.SESSION_START_INFO_TAG, told)


def _session_end(status: str, end: float) -> "Summary.Value":
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    success, failure = api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE
    ended = success if status == FINISHED else failure
    session = plugin_data_pb2.SessionEndInfo(status=ended, end_time_secs=end)
    told = plugin_data_pb2.HParamsPluginData(session_end_info=session)
    return _of_hparams(metadata.SESSION_END_INFO_TAG, told)


def _of_hparams(tag: str, told: object) -> "Summary.Value":
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    about = metadata.create_summary_metadata(told)
    return Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
