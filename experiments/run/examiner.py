"""In a worker: a model is asked, as `ablab eval` asks it on the machine where it was typed."""

import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ablab.core.errors import Halted as HaltedJob
from ablab.core.errors import UserError, told
from ablab.core.store.claim import Watch, take
from ablab.core.store.store import Store
from ablab.experiments.evaluate.answering import devices_of
from ablab.experiments.evaluate.evaluating import evaluate
from ablab.experiments.evaluate.exam import Examination
from ablab.experiments.evaluate.progress import Held
from ablab.experiments.run.messages import (
    Asked,
    Busy,
    EvalJob,
    Evaluated,
    Halted,
    Message,
    Order,
    Stop,
    Unevaluated,
)


def answer(
    job: EvalJob,
    watch: Watch,
    say: Callable[[Message], None],
    orders: Callable[[], list[Order]],
) -> Busy | Evaluated | Halted | Unevaluated:
    """watch: of claims.  orders: those that have come.  Raises UserError where this machine cannot ask it."""
    hearing = Hearing(job.run, say, orders)
    claiming = partial(take, watch=watch)
    try:
        exam = _exam(job)
        devices = devices_of(job.how)
        evaluate(job.subject, exam, job.how, devices, hearing, claiming)
    except HaltedJob as end:
        return Halted(end.step)
    except Held:
        return Busy()
    except UserError:
        raise
    except (Exception, SystemExit) as fault:
        return Unevaluated(told(fault))
    return Evaluated()


def _exam(job: EvalJob) -> Examination:
    """The one that was meant.  Raises UserError, which names this machine, for it is seldom the one that asks."""
    host = socket.gethostname()
    try:
        job.subject.check()
        exam = job.request.exam(job.subject, Store(job.subject.store))
    except UserError as flaw:
        raise UserError(f"{host}: {flaw}") from None
    if exam.bundle != job.bundle:
        raise UserError(
            f"{host}: {exam.title} has other questions there (digest {exam.bundle}) than where it was asked for "
            f"({job.bundle}); give --bundle a folder that every machine sees"
        )
    return exam


@dataclass(frozen=True)
class Hearing:
    """Who is told of an evaluation, and says when to stop."""

    run: str
    say: Callable[[Message], None]
    orders: Callable[[], list[Order]]

    def __call__(self, known: int, total: int) -> None:
        """Raises Halted where it is to be let go of."""
        self.say(Asked(known, total))
        for order in self.orders():
            if not isinstance(order, Stop) or order.run == self.run:
                raise HaltedJob(known)
