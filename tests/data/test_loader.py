import json
import random
import threading
import tracemalloc
from functools import cache
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_config, make_text, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from data.benchmark_loader import write_sparse_corpus
from data.loader import BOUNDARIES, Loader, build_loader, start_id
from data.mixture import MIXTURE_BLOCK, Mixture, Phase
from data.prepare import prepare
from data.shards import Corpus
from data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from pretrain.batch import Batch

T, G, GRID = 64, 8, 16  # seq_len, global batch size, reset grid


def loader_of(corpus: Corpus | Mixture, mode: str, **changes) -> Loader:
    arguments = {
        "seq_len": T,
        "global_batch_size": G,
        "micro_batch_size": G,
        "seed": 1,
        "reset_grid": GRID if mode == "lanes" else 1,
        "prefetch_steps": 0,
    }
    return build_loader(corpus, mode=mode, **{**arguments, **changes})


def joined(micro_batches: list[Batch]) -> Batch:
    """The rows of several micro-batches as one."""
    return Batch(
        *[
            None if parts[0] is None else torch.cat(parts)
            for parts in zip(*micro_batches, strict=True)
        ]
    )


def assert_equal(one: Batch, other: Batch) -> None:
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def steps_per_epoch(corpus: Corpus) -> int:
    """Steps behind which every document of the first epoch has ended, in either order."""
    slots = (corpus.doc_lengths + 1 + GRID).sum() / G + corpus.doc_lengths.max()
    return int(slots // T + 2)


@pytest.mark.parametrize("mode", ["lanes", "windows"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_the_order_is_the_same_for_any_world_size_and_accumulation(
    corpus: Corpus, mode: str, world_size: int, grad_accum_steps: int
) -> None:
    n_steps = steps_per_epoch(corpus)
    reference = loader_of(corpus, mode).steps(0)
    size = G // world_size // grad_accum_steps
    ranks = [
        loader_of(corpus, mode, rank=rank, world_size=world_size, micro_batch_size=size).steps(0)
        for rank in range(world_size)
    ]
    for _ in range(n_steps):
        parts = [next(rank) for rank in ranks]
        assert [len(part) for part in parts] == [grad_accum_steps] * world_size
        assert_equal(joined([batch for part in parts for batch in part]), joined(next(reference)))


@pytest.mark.parametrize("mode", ["lanes", "windows"])
@pytest.mark.parametrize("prefetch_steps", [0, 3])
def test_stopping_at_any_step_and_restarting_gives_the_same_stream(
    corpus: Corpus, mode: str, prefetch_steps: int
) -> None:
    n_steps = 40
    whole = [joined(step) for step in islice(loader_of(corpus, mode).steps(0), n_steps)]
    for start in range(0, n_steps, 3):
        steps = loader_of(corpus, mode, prefetch_steps=prefetch_steps).steps(start)
        for expected, got in zip(whole[start : start + 4], steps, strict=False):
            assert_equal(joined(got), expected)


def streams(corpus: Corpus, n_steps: int, **changes) -> tuple[np.ndarray, ...]:
    """All lanes as rows of slots: tokens, doc_id, target flags (of the same slot), resets."""
    batches = [
        joined(step) for step in islice(loader_of(corpus, "lanes", **changes).steps(0), n_steps)
    ]
    tokens = torch.cat([batch.tokens[:, :-1] for batch in batches], 1)
    doc_id = torch.cat([batch.doc_id[:, :-1] for batch in batches], 1)
    mask = torch.cat([batch.loss_mask for batch in batches], 1)
    target = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask[:, :-1]], 1)
    resets = torch.cat([batch.resets for batch in batches], 1)
    for one, following in pairwise(batches):
        assert torch.equal(one.tokens[:, -1], following.tokens[:, 0]), "segments overlap by one"
        assert torch.equal(one.doc_id[:, -1], following.doc_id[:, 0])
    return tuple(part.numpy() for part in (tokens, doc_id, target, resets))


@pytest.mark.parametrize("grid", [1, 16, 64])
@pytest.mark.parametrize("n_lanes", [1, 3, 8, 20])
def test_lanes_deliver_every_token_of_every_document_exactly_once(
    corpus: Corpus, grid: int, n_lanes: int
) -> None:
    slots = (corpus.doc_lengths + 1 + grid).sum() / n_lanes + corpus.doc_lengths.max()
    tokens, doc_id, target, resets = streams(
        corpus,
        int(slots // T + 2),
        reset_grid=grid,
        global_batch_size=n_lanes,
        micro_batch_size=n_lanes,
    )
    seen = []
    for lane in range(n_lanes):
        edges = np.flatnonzero(np.repeat(resets[lane], grid)[: tokens.shape[1]].reshape(-1, grid))
        starts = [int(edge) for edge in edges if edge % grid == 0]
        assert (np.flatnonzero(tokens[lane] == BOS_ID) == starts).all(), "resets where BOS is"
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            run, ids, hit = (part[lane, start:stop] for part in (tokens, doc_id, target))
            document = corpus.document(ids[0])
            if len(run) < 1 + len(document):
                assert stop is None, "only the run's end may cut a document"
                continue
            n = 1 + len(document)
            assert run[0] == BOS_ID
            assert run[n - 1] == EOS_ID
            np.testing.assert_array_equal(run[1:n], document)
            assert (ids[:n] == ids[0]).all()
            np.testing.assert_array_equal(hit[:n], [False] + [True] * len(document))
            assert len(run[n:]) < grid
            assert (run[n:] == PAD_ID).all()
            assert (ids[n:] == -1).all()
            assert not hit[n:].any()
            seen.append((start, lane, int(ids[0])))
    # The schedule deals out documents by (slot, lane): the first of these are the first epoch.
    epoch = [document for _, _, document in sorted(seen)[: corpus.n_documents]]
    if n_lanes <= corpus.n_documents:
        assert sorted(epoch) == list(range(corpus.n_documents))
    else:
        assert set(epoch) <= set(range(corpus.n_documents))


def test_windows_deliver_every_token_exactly_once_per_epoch(corpus: Corpus) -> None:
    n = corpus.n_tokens
    stream = np.concatenate([corpus.document(i) for i in range(corpus.n_documents)])
    n_windows = -(-n // T)
    rows = []
    for step in islice(loader_of(corpus, "windows").steps(0), -(-2 * n_windows // G)):
        batch = joined(step)
        assert batch.resets is None
        rows += list(zip(batch.tokens, batch.loss_mask, batch.doc_id, strict=True))
    for epoch in (rows[:n_windows], rows[n_windows : 2 * n_windows]):
        targets = [tokens[1:][mask] for tokens, mask, _ in epoch]
        expected = [stream[k * T : (k + 1) * T] for k in range(n_windows)]
        found = sorted(tuple(part.tolist()) for part in targets)
        assert found == sorted(tuple(part.tolist()) for part in expected)
        assert sum((tokens[0] == BOS_ID).item() for tokens, _, _ in epoch) == 1
    for tokens, mask, doc_id in rows[:n_windows]:
        np.testing.assert_array_equal(mask, doc_id[1:] >= 0)
        assert (tokens[doc_id < 0] == PAD_ID).all()
        changes = np.flatnonzero(np.diff(doc_id[doc_id >= 0]))
        assert all(tokens[i] == EOS_ID for i in changes), "EOS separates packed neighbours"


@pytest.mark.parametrize("mode", ["lanes", "windows"])
def test_documents_begin_behind_the_token_that_evaluation_puts_there(
    corpus: Corpus, mode: str
) -> None:
    before = []
    for step in islice(loader_of(corpus, mode).steps(0), steps_per_epoch(corpus)):
        batch = joined(step)
        new = batch.doc_id[:, 1:] != batch.doc_id[:, :-1]
        if mode == "lanes":  # There the token in front is counted to the document.
            new = torch.cat([torch.zeros(G, 1, dtype=torch.bool), new[:, :-1]], 1)
        before += batch.tokens[:, :-1][new & batch.loss_mask].tolist()
    assert len(before) >= corpus.n_documents // 2
    assert set(before) == {start_id(mode)}


def test_an_epochs_remainder_shares_a_batch_with_the_next_epoch(corpus: Corpus) -> None:
    n_windows = -(-corpus.n_tokens // T)
    assert n_windows % G != 0
    loader = loader_of(corpus, "windows")
    last = n_windows // G
    assert [loader.state(step)["epoch"] for step in (0, last, last + 1)] == [0, 0, 1]
    assert joined(loader.step(last)).loss_mask.any(1).all()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["lanes", "windows"]), st.integers(0, 10**6))
def test_far_steps_are_reached_without_walking(corpus: Corpus, mode: str, step: int) -> None:
    step = step % 2000 if mode == "lanes" else step
    loader = loader_of(corpus, mode)
    assert_equal(joined(loader.step(step)), joined(next(loader.steps(step))))
    assert joined(loader.step(step)).loss_mask.any()


def test_batches_have_the_stated_shapes_and_dtypes(corpus: Corpus) -> None:
    (batch,) = loader_of(corpus, "lanes").step(0)
    assert batch.tokens.shape == batch.doc_id.shape == (G, T + 1)
    assert batch.tokens.dtype == batch.doc_id.dtype == torch.int64
    assert (batch.loss_mask.shape, batch.loss_mask.dtype) == ((G, T), torch.bool)
    assert batch.resets is not None
    assert (batch.resets.shape, batch.resets.dtype) == ((G, T // GRID), torch.bool)
    assert batch.resets[:, 0].all(), "every lane begins with a document"


def test_seeds_give_different_orders(corpus: Corpus) -> None:
    for mode in ("lanes", "windows"):
        one, other = (joined(loader_of(corpus, mode, seed=seed).step(0)) for seed in (1, 2))
        assert not torch.equal(one.tokens, other.tokens)


@pytest.mark.parametrize("mode", ["lanes", "windows"])
def test_state_is_json_and_equal_for_every_rank_and_accumulation(corpus: Corpus, mode: str) -> None:
    states = [
        loader_of(corpus, mode, rank=rank, world_size=world, micro_batch_size=1).state(7)
        for world in (1, 4)
        for rank in range(world)
    ]
    assert all(state == states[0] for state in states)
    saved = json.loads(json.dumps(states[0]))
    assert saved["tokens_consumed"] == 7 * G * T
    loader_of(corpus, mode).check_state(saved)


def test_check_state_names_every_difference(corpus: Corpus) -> None:
    saved = loader_of(corpus, "lanes").state(5)
    other = loader_of(corpus, "lanes", seed=9, seq_len=2 * T, reset_grid=2 * GRID)
    with pytest.raises(ValueError, match="data order") as caught:
        other.check_state({**saved, "fingerprint": "another corpus"})
    for difference in (
        "seed: saved 1, now 9",
        f"seq_len: saved {T}, now {2 * T}",
        f"reset_grid: saved {GRID}, now {2 * GRID}",
        f"fingerprint: saved another corpus, now {corpus.fingerprint}",
    ):
        assert difference in str(caught.value)
    with pytest.raises(ValueError, match="mode: saved lanes, now windows"):
        loader_of(corpus, "windows").check_state(saved)
    with pytest.raises(ValueError, match="lanes: saved 8, now 4"):
        loader_of(corpus, "lanes", global_batch_size=4, micro_batch_size=1).check_state(saved)


def test_arguments_that_do_not_fit_are_refused_together_with_the_nearest_values(
    corpus: Corpus,
) -> None:
    with pytest.raises(ValueError, match="global_batch_size=10") as caught:
        loader_of(
            corpus,
            "lanes",
            global_batch_size=10,
            micro_batch_size=2,
            world_size=2,
            seq_len=40,
            boundary="packed",
        )
    message = str(caught.value)
    assert "micro_batch_size*world_size = 2*2 = 4; nearest: 8 or 12" in message
    assert "seq_len=40: not a multiple of the model's reset grid 16" in message
    assert "nearest: 32 or 48" in message
    assert (
        "boundary=packed with mode=lanes: use boundary=pad_block or pad_segment or cross" in message
    )
    with pytest.raises(ValueError, match="mode=lane: must be one of lanes, windows"):
        loader_of(corpus, "lane")


def test_closing_the_stream_ends_its_thread(corpus: Corpus) -> None:
    steps = loader_of(corpus, "lanes", prefetch_steps=2).steps(0)
    next(steps)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    steps.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_an_error_in_the_prefetch_thread_reaches_the_caller(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = loader_of(corpus, "lanes", prefetch_steps=2)
    step = loader.step

    def fail_at_three(n: int) -> list[Batch]:
        if n == 3:
            raise OSError("the disk went away")
        return step(n)

    monkeypatch.setattr(loader, "step", fail_at_three)
    steps = loader.steps(0)
    for _ in range(3):
        next(steps)
    with pytest.raises(OSError, match="the disk went away"):
        next(steps)


@pytest.fixture(scope="session")
def mixture(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Two corpora; the weights change behind twelve steps of lanes, or one block of windows."""
    folder = tmp_path_factory.mktemp("other")
    generator = random.Random(8)
    texts = [make_text(generator, n).upper() for n in (40, 400, 8, 120, 900, 33)]
    prepare(make_config(write_jsonl(folder / "texts.jsonl", texts), folder / "corpus"))
    other = Corpus.open(folder / "corpus", "train")
    return Mixture([corpus, other], [Phase(0, (3.0, 1.0)), Phase(12 * G * T, (1.0, 3.0))])


CASES = [(mode, boundary) for mode, choices in BOUNDARIES.items() for boundary in choices]
MIXED_STEPS = {
    "lanes": range(100),
    "windows": range(MIXTURE_BLOCK // G - 50, MIXTURE_BLOCK // G + 50),
}
"""Steps across the ends of an epoch of each corpus and the change of weights."""


@pytest.fixture(scope="session")
def uninterrupted(mixture: Mixture):
    """The batches of `MIXED_STEPS`, read in one thread of one rank."""

    @cache
    def batches(mode: str, boundary: str, mixed: bool) -> list[Batch]:
        loader = loader_of(
            mixture if mixed else mixture.corpora[0], mode, boundary=boundary, reset_grid=GRID
        )
        return [joined(loader.step(step)) for step in MIXED_STEPS[mode]]

    return batches


@pytest.mark.parametrize("mixed", [False, True], ids=["one corpus", "mixture"])
@pytest.mark.parametrize(("mode", "boundary"), CASES)
def test_the_steps_cross_an_epochs_end_and_a_change_of_weights(
    mixture: Mixture, mode: str, boundary: str, mixed: bool
) -> None:
    loader = loader_of(
        mixture if mixed else mixture.corpora[0], mode, boundary=boundary, reset_grid=GRID
    )
    ends = [loader.state(step)["epoch"] for step in (MIXED_STEPS[mode][0], MIXED_STEPS[mode][-1])]
    assert np.all(np.array(ends[0]) < np.array(ends[1]))


@settings(max_examples=6, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("mixed", [False, True], ids=["one corpus", "mixture"])
@pytest.mark.parametrize(("mode", "boundary"), CASES)
def test_runs_stopped_anywhere_and_continued_by_other_ranks_and_threads_join_to_the_whole(
    mixture: Mixture, uninterrupted, mode: str, boundary: str, mixed: bool, data: st.DataObject
) -> None:
    expected = uninterrupted(mode, boundary, mixed)
    steps = MIXED_STEPS[mode]
    stops = data.draw(st.sets(st.sampled_from(steps[1:]), max_size=4), label="stops")
    saved = None
    for start, stop in pairwise([steps.start, *sorted(stops), steps.stop]):
        world_size = data.draw(st.sampled_from([1, 2, 4, 8]), label="world_size")
        accumulation = data.draw(st.sampled_from([1, G // world_size]), label="accumulation")
        threads = data.draw(st.integers(0, 3), label="threads")
        ranks = [
            loader_of(
                mixture if mixed else mixture.corpora[0],
                mode,
                boundary=boundary,
                reset_grid=GRID,
                rank=rank,
                world_size=world_size,
                micro_batch_size=G // world_size // accumulation,
                prefetch_steps=2 * threads,
                threads=max(1, threads),
            )
            for rank in range(world_size)
        ]
        if saved is not None:
            for rank in ranks:
                rank.check_state(saved)
        streams = [rank.steps(start) for rank in ranks]
        for step in range(start, stop):
            parts = [next(stream) for stream in streams]
            assert {len(part) for part in parts} == {accumulation}
            assert_equal(
                joined([batch for part in parts for batch in part]), expected[step - steps.start]
            )
        if threads:
            for stream in streams:
                stream.close()
        saved = json.loads(json.dumps(ranks[-1].state(stop)))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("mode", "boundary"), CASES)
def test_ranks_of_a_sequence_parallel_group_get_neighbouring_parts_of_the_same_rows(
    mixture: Mixture, uninterrupted, mode: str, boundary: str, size: int
) -> None:
    expected = uninterrupted(mode, boundary, True)
    groups = [
        [
            loader_of(
                mixture,
                mode,
                boundary=boundary,
                reset_grid=GRID,
                rank=group * size + place,
                world_size=2 * size,
                sequence_parallel_size=size,
                micro_batch_size=G // 4,
            )
            for place in range(size)
        ]
        for group in range(2)
    ]
    assert len({json.dumps(rank.state(7)) for group in groups for rank in group}) == 1
    for step in MIXED_STEPS[mode]:
        rows = []
        for group in groups:
            parts = [joined(rank.step(step)) for rank in group]
            for part, following in pairwise(parts):
                assert torch.equal(part.tokens[:, -1], following.tokens[:, 0])
                assert torch.equal(part.doc_id[:, -1], following.doc_id[:, 0])
            assert {part.tokens.shape for part in parts} == {(G // 2, T // size + 1)}
            rows.append(side_by_side(parts))
        assert_equal(joined(rows), expected[step - MIXED_STEPS[mode].start])


def side_by_side(parts: list[Batch]) -> Batch:
    """Rows of parts of them that overlap by one slot."""
    last = parts[-1]
    return Batch(
        torch.cat([*(part.tokens[:, :-1] for part in parts), last.tokens[:, -1:]], 1),
        torch.cat([part.loss_mask for part in parts], 1),
        None if last.resets is None else torch.cat([part.resets for part in parts], 1),
        torch.cat([*(part.doc_id[:, :-1] for part in parts), last.doc_id[:, -1:]], 1),
    )


def test_a_sequence_parallel_size_that_does_not_fit_is_refused(corpus: Corpus) -> None:
    with pytest.raises(
        ValueError, match="world_size=4: not a multiple of sequence_parallel_size=3"
    ):
        loader_of(corpus, "lanes", world_size=4, sequence_parallel_size=3)
    with pytest.raises(ValueError, match="seq_len=64: sequence_parallel_size=3 ranks") as caught:
        loader_of(corpus, "lanes", world_size=3, sequence_parallel_size=3)
    assert str(caught.value).endswith("equal parts in multiples of 16; nearest: 48 or 96")


@pytest.mark.parametrize(("mode", "boundary"), CASES)
def test_a_mixture_hands_out_its_documents_under_numbers_of_their_own(
    mixture: Mixture, uninterrupted, mode: str, boundary: str
) -> None:
    documents = [c.document(i).tolist() for c in mixture.corpora for i in range(c.n_documents)]
    texts = [np.array(document, np.uint16).tobytes() for document in documents]
    seen = set()
    for batch in uninterrupted(mode, boundary, True):
        for tokens, doc_id in zip(batch.tokens.numpy(), batch.doc_id.numpy(), strict=True):
            edges = [0, *(np.flatnonzero(np.diff(doc_id)) + 1), len(doc_id)]
            for begin, end in pairwise(edges):
                part, number = tokens[begin:end], doc_id[begin]
                assert (part == PAD_ID).all() if number < 0 else True
                if number >= 0:
                    inner = part[part != BOS_ID].astype(np.uint16).tobytes()
                    assert inner in texts[number] or inner in 2 * texts[number]
                    seen.add(int(number))
    assert seen == set(range(len(documents)))


def test_lanes_of_a_mixture_have_exact_shares_from_the_first_step_on(mixture: Mixture) -> None:
    loader = loader_of(mixture, "lanes", boundary="cross")
    first, second = mixture.corpora
    # A lane that changes hands reads its document to the end, the longest one at worst.
    settled = 12 + int(max(first.doc_lengths.max(), second.doc_lengths.max())) // T + 2
    for step, lanes in [(0, 2), (5, 2), (11, 2), (settled, 6), (settled + 9, 6)]:
        batch = joined(loader.step(step))
        assert ((batch.doc_id[:, 1:] >= first.n_documents).sum() == lanes * T).item()


def test_padded_windows_deliver_every_token_once_per_epoch_and_reset_at_documents(
    corpus: Corpus,
) -> None:
    changes = {"global_batch_size": 1, "micro_batch_size": 1, "reset_grid": GRID}
    loader = loader_of(corpus, "windows", boundary="pad_block", **changes)
    delivered: list[list[int]] = [[] for _ in range(corpus.n_documents)]
    for step in range(10**6):
        if loader.state(step)["epoch"] == 1:
            break
        (batch,) = loader.step(step)
        assert batch.resets is not None
        tokens, mask, resets, doc_id = (part[0] for part in batch)
        starts = torch.where(tokens == BOS_ID)[0].tolist()
        assert [start for start in starts if start < T] == (torch.where(resets)[0] * GRID).tolist()
        begins = torch.where((doc_id[1:] >= 0) & (doc_id[1:] != doc_id[:-1]))[0] + 1
        assert set(begins.tolist()) <= set(starts), "no document behind another without a reset"
        for token, number in zip(tokens[1:][mask].tolist(), doc_id[1:][mask].tolist(), strict=True):
            delivered[number].append(token)
    for i, got in enumerate(delivered):
        assert sorted(got) == sorted(corpus.document(i).tolist())


@pytest.mark.parametrize("boundary", ["cross", "pad_segment"])
def test_lanes_cross_documents_or_wait_for_the_segments_end(corpus: Corpus, boundary: str) -> None:
    loader = loader_of(corpus, "lanes", boundary=boundary)
    batches = [joined(loader.step(step)) for step in range(60)]
    tokens = torch.cat([batch.tokens[:, :-1] for batch in batches], 1)
    lanes, slots = torch.where(tokens == BOS_ID)
    if boundary == "cross":
        assert all(batch.resets is None for batch in batches)
        assert not (tokens == PAD_ID).any()
        later = slots > 0
        assert (tokens[lanes[later], slots[later] - 1] == EOS_ID).all()
        assert (slots % GRID != 0).any()
    else:
        assert (slots % T == 0).all()
        for batch in batches:
            starts = batch.tokens[:, 0] == BOS_ID
            assert torch.equal(batch.resets[:, 0], starts)
            assert not batch.resets[:, 1:].any()
    targets = torch.cat([batch.loss_mask for batch in batches], 1)
    assert torch.equal(targets[:, :-1], (tokens[:, 1:] != BOS_ID) & (tokens[:, 1:] != PAD_ID))


def test_windows_over_many_documents_never_hold_their_index(tmp_path: Path) -> None:
    n = 1_000_000
    corpus = write_sparse_corpus(tmp_path, n)
    tracemalloc.start()
    loader = build_loader(
        corpus, mode="windows", seq_len=T, global_batch_size=2, micro_batch_size=2, prefetch_steps=0
    )
    tracemalloc.reset_peak()  # Building frees one large block, see there.
    batch = joined([batch for step in (0, 10**6, 10**9) for batch in loader.step(step)])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < peak < 8 * n / 8, "an eighth of where documents start"
    assert batch.doc_id.max() > n // 2
    assert torch.equal(batch.doc_id[:, 1:] % 4, (torch.arange(T) // 16).expand(6, T))


@pytest.mark.gpu
def test_batches_are_pinned_and_filled_in_place(corpus: Corpus) -> None:
    (batch,) = next(loader_of(corpus, "lanes", prefetch_steps=2, threads=2).steps(0))
    assert all(part.is_pinned() for part in batch)
