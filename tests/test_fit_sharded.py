"""A dictionary whose latents lie in several processes is trained as one process trains it."""

from __future__ import annotations

import sys

import pytest
import torch

from processes import main, played_by
from rarefy.errors import Unsupported
from rarefy.fit import train
from rarefy.latents.relu import ReLU
from rarefy.latents.topk import TopK
from rarefy.store.checkpoint import load_checkpoint
from rarefy.store.lines import read_lines
from rarefy.streams import TensorStream
from test_fit_parallel import B, F, close, recipe, rows, told

D, WIDTH = rows().shape[1], F + 3
"""64 latents: 32 a process."""


def dictionary(**kw):
    return TopK(D, WIDTH, 3, **{"dead_after": 40, "aux_k": 5, **kw}).double()


def fit(folder, shards, plan=None, **kw):
    plan = plan or {"topk": dictionary(), "wide_aux": dictionary(aux_k=60)}
    heard = []
    train(plan, TensorStream(rows(), B), recipe(**kw), folder, on_log=heard.append, shards=shards)
    return {"weights": told(plan), "heard": [record["methods"] for record in heard]}


class Cut:
    """The stream whose power goes at step 6."""

    made_from = TensorStream(rows(), B).made_from

    def batches(self, start=0):
        for step, batch in enumerate(TensorStream(rows(), B).batches(start), start):
            if step == 6:
                raise RuntimeError("the power went")
            yield batch


def cut_off(folder, shards):
    with pytest.raises(RuntimeError, match="the power went"):
        train({"topk": dictionary()}, Cut(), recipe(), folder, shards=shards)


def taken_up(rank, folder):
    """Begun by two processes that share rows, gone on with by two that share latents."""
    cut_off(folder / "run", 1)
    return fit(folder / "run", 2, {"topk": dictionary()})


def left(rank, folder):
    """Begun by two processes that share latents; one process alone will go on."""
    cut_off(folder / "run", 2)


def moved(rank, folder):
    """Transcoder, and no auxiliary loss."""
    x = rows()
    plan = {"topk": TopK(D, WIDTH, 3, d_out=4, aux_alpha=0.0).double()}
    train(plan, TensorStream(x, B, y_NE=x[:, :4] ** 2), recipe(), shards=2)
    return {"weights": told(plan)}


def refused(rank, folder):
    out = {}
    for name, method, shards in (("relu", ReLU(D, WIDTH), 2), ("odd", TopK(D, F, 3), 2), ("narrow", TopK(D, 4, 3), 2), ("three", dictionary(), 3)):
        try:
            fit(None, shards, {name: method.double()})
        except Exception as error:
            out[name] = f"{type(error).__name__}: {error}"
    return out


SCENES = {
    "shared": lambda rank, folder: fit(folder / "run", 2), "taken_up": taken_up, "left": left, "moved": moved, "refused": refused,
    "both": lambda rank, folder: fit(folder / "run", 2),
}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    return played_by(__file__, tmp_path_factory.mktemp("sharded"), SCENES)


def as_alone(first, run, names=("topk", "wide_aux")):
    alone = fit(None, 1)
    close(first["weights"], {k: v for k, v in alone["weights"].items() if k.split("/")[0] in names})
    assert max(alone["weights"]["topk/idle_F"]) > 40                        # AuxK was at work
    for got, want in zip(first["heard"], alone["heard"], strict=True):
        for name in names:
            for part, value in want[name].items():
                assert got[name][part] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, part)
    assert [r["step"] for r in read_lines(run / "log.jsonl")] == [3, 6, 9, 12]


def test_two_shards_train_as_one_process(played):
    (first, second), run = played("shared")
    as_alone(first, run)
    assert second["heard"] == [] and second["weights"] != first["weights"]  # the first holds the whole


def test_a_checkpoint_is_that_of_the_whole(played):
    tensors = load_checkpoint(played("shared")[1] / "checkpoints").tensors
    one = told({"topk": dictionary()})
    for key in one:
        assert list(tensors[key.replace("/", "/method/", 1)].shape) == list(torch.tensor(one[key]).shape), key
    assert list(tensors["topk/optimiser/0/exp_avg"].shape) == [WIDTH, D]


def test_a_run_is_taken_up_by_another_number_of_shards(played):
    (first, _), _ = played("taken_up")
    assert len(first["heard"]) == 3                                         # of steps 6, 9 and 12: it went on from 4 and did not begin anew
    close(first["weights"], {k: v for k, v in fit(None, 1)["weights"].items() if k.startswith("topk/")})


def test_a_run_of_shards_is_taken_up_by_one_process(played):
    _, run = played("left")
    assert load_checkpoint(run / "checkpoints").step == 4
    alone = fit(run, 1, {"topk": dictionary()})
    assert len(alone["heard"]) == 3
    close(alone["weights"], {k: v for k, v in fit(None, 1)["weights"].items() if k.startswith("topk/")})


def test_a_transcoder_is_shared_out_too(played):
    (first, _), _ = played("moved")
    x = rows()
    plan = {"topk": TopK(D, WIDTH, 3, d_out=4, aux_alpha=0.0).double()}
    train(plan, TensorStream(x, B, y_NE=x[:, :4] ** 2), recipe())
    close(first["weights"], told(plan))


def test_shards_and_shares_of_rows_together(played):
    results, run = played("both")
    assert len(results) == 4
    alone = fit(None, 1, accumulate=2)                                      # each set of shards has half of the rows
    close(results[0]["weights"], alone["weights"])
    assert [r["step"] for r in read_lines(run / "log.jsonl")] == [3, 6, 9, 12]


def test_what_cannot_be_shared_out_is_refused_by_name(played):
    for one in played("refused")[0]:
        assert one["relu"].startswith("Unsupported: latents/relu cannot be shared out")
        assert one["odd"].startswith("BadInput: width=61 does not divide over 2 shards")
        assert one["narrow"].startswith("BadInput: width=4 does not divide over 2 shards of at least k=3")
        assert one["three"].startswith("BadInput: shards=3 must divide the number of processes, 2")


def test_without_processes_there_is_nothing_to_share(tmp_path):
    with pytest.raises(Exception, match="shards=2 must divide the number of processes, 1"):
        fit(tmp_path, 2)
    with pytest.raises(Unsupported, match="weights/wanda|latents/relu"):
        ReLU(4, 8).shard(None)


if __name__ == "__main__":
    sys.exit(main(SCENES, lambda name: 4 if name == "both" else 2))
