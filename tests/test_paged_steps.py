"""Steps of a cache in blocks are written once and whole, or dropped; a mistake raises by name and changes nothing."""

import pytest
import torch
from patching import tiny

import fused_ops
from models_patch.paged_cache import PagedKVCache


@pytest.fixture(autouse=True)
def reference():
    with fused_ops.use_backend("reference"), torch.no_grad():
        yield


def _cache():
    return PagedKVCache(tiny(num_hidden_layers=2).config, 64, 4)


def _started():
    """A step of two sequences is still to be written."""
    cache = _cache()
    cache.step({cache.add(): 3, cache.add(): 3})
    return cache


def _write(cache, length: int, layers: int = 2):
    for layer in range(layers):
        cache.update(_keys(1, length), _keys(1, length), layer)
    return cache


def _written():
    """Two sequences of three tokens."""
    return _write(_started(), 6)


def _half_written():
    """A call that failed in its second layer."""
    cache = _written()
    cache.step({0: 2, 1: 1})
    return _write(cache, 3, layers=1)


def _added():
    cache = _cache()
    cache.add()
    return cache


def _dropped():
    cache = _started()
    cache.free(0)
    return cache


def _keys(batch: int, length: int):
    return torch.zeros(batch, 2, length, 16)


def _again(cache):
    for length in 3, 1:
        cache.update(_keys(1, 2 * length), _keys(1, 2 * length), 0)


def _other_rows(cache):
    cache.update(_keys(2, 3), _keys(2, 3), 0)
    cache.update(_keys(3, 1), _keys(3, 1), 0)


def _uneven_rows(cache):
    cache.step({0: 1})
    _write(cache, 1)
    cache.set_rows([0, 1])


def _without_the_others(cache):
    """The last of the sequences is freed: the next call may not be a batch of its own."""
    cache.free(0)
    cache.free(1)
    _write(cache, 1)


@pytest.mark.parametrize(
    ("make", "use", "message"),
    [
        (tiny, lambda model: PagedKVCache(model.config, 0), "num_blocks is 0, expected a positive int"),
        (tiny, lambda model: PagedKVCache(model.config, 1, 2.0), "block_size is 2.0, expected a positive int"),
        (_cache, lambda cache: cache.free(3), r"there is no sequence 3; there are \[\]"),
        (_written, lambda cache: cache.step({1: 0}), "sequence 1 gets 0 tokens, expected at least one"),
        (_written, lambda cache: cache.add(prefix_of=0, length=4), "add: length is 4, expected 0 to 3, sequence 0's"),
        (_started, lambda cache: cache.add(prefix_of=0), "add: length is 3, expected 0 to 0: .* still to be written"),
        (_half_written, lambda cache: cache.add(prefix_of=1, length=4), "add: length is 4, expected 0 to 3: the other"),
        (_written, lambda cache: cache.truncate(0, 4), "truncate: length is 4, expected 0 to 3, sequence 0's"),
        (_written, lambda cache: cache.truncate(0, -1), "truncate: length is -1, expected 0 to 3, sequence 0's"),
        (_started, lambda cache: cache.truncate(0, 2), "truncate: length is 2, expected 0 to 0: .* all or none"),
        (_started, lambda cache: cache.step({0: 1}), r"the step before, of .* \[0, 1\], .* truncate\(0, 0\) drops"),
        (_half_written, lambda cache: cache.step({0: 1}), r"still to be written .* truncate\(0, 3\) drops it"),
        (_started, lambda cache: cache.set_rows([0, 1]), "set_rows: the step before"),
        (_added, lambda cache: _write(cache, 3), r"called without a step; call step\(\), set_rows\(\)"),
        (_written, _without_the_others, "called without a step"),
        (_dropped, lambda cache: _write(cache, 3), "step was dropped when sequence 0 was freed; its other sequences"),
        (_started, lambda cache: cache.update(_keys(1, 5), _keys(1, 5), 0), r"1 x 5 tokens, .* 3 \+ 3 in one row"),
        (_started, lambda cache: cache.update(_keys(3, 2), _keys(3, 2), 0), r"3 x 2 tokens, .* 3 \+ 3 in one row"),
        (_started, _again, r"called without a step; call step\(\), set_rows\(\)"),
        (_written, _uneven_rows, r"sequences have lengths \[4, 3\], expected one for all"),
        (_cache, _other_rows, r"keys are of 3 rows, expected 2; reset\(\) forgets them"),
        (_cache, lambda cache: cache.update(_keys(1, 2), _keys(1, 2), 2), "keys of layer 2, .* has 2 layers"),
        (_cache, lambda cache: cache.crop(2), "tokens_to_remove is 2, expected a negative int or 0"),
    ],
)  # fmt: skip
def test_mistakes_raise_by_name(make, use, message):
    made = make()
    with pytest.raises(ValueError, match=message):
        use(made)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda cache: cache.truncate(0, 2.0), "truncate: length is float, expected an int"),
        (lambda cache: cache.truncate(0, None), "truncate: length is NoneType, expected an int"),
        (lambda cache: cache.add(prefix_of=0, length=2.0), "add: length is float, expected an int"),
        (lambda cache: cache.set_rows(5), "set_rows: sequences is int, expected a list"),
        (lambda cache: cache.crop(-1.0), "crop: tokens_to_remove is float, expected an int"),
    ],
)
def test_types_are_checked(use, message):
    with pytest.raises(TypeError, match=message):
        use(_written())


@pytest.mark.parametrize("make", [_started, _half_written])
@pytest.mark.parametrize("drop", ["free", "truncate", "reset"])
def test_a_step_is_dropped_as_a_whole(make, drop):
    cache = make()
    counts = dict(zip(cache.current.sequences, cache.current.counts, strict=True))
    before = {sequence: cache.length(sequence) - count for sequence, count in counts.items()}
    {
        "free": lambda: cache.free(0),
        "truncate": lambda: cache.truncate(0, before[0]),
        "reset": lambda: cache.reset(),
    }[drop]()
    assert cache.length(1) == before[1]
    if drop == "free":
        assert cache.free_blocks == 64 - (before[1] > 0)
        counts.pop(0)
    else:
        assert cache.length(0) == before[0]
    if drop != "reset":
        with pytest.raises(ValueError, match=r"dropped when sequence 0 was .* call step\(\) anew"):
            _write(cache, sum(counts.values()))
        assert cache.length(1) == before[1]
    cache.step(counts)
    _write(cache, sum(counts.values()))
    assert cache.length(1) == before[1] + counts[1]


def test_sequences_that_have_their_tokens_change_freely():
    cache = _written()
    third = cache.add(prefix_of=0, length=2)
    cache.step({third: 2})
    cache.truncate(0, 1)  # which isn't in the step
    cache.truncate(third, 4)  # as it is
    cache.free(1)
    _write(cache, 2)
    assert (cache.length(0), cache.length(third)) == (1, 4)
    cache.step({0: 1})
    _write(cache, 1)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ({}, ValueError, "tokens is {}, expected at least one sequence"),
        ([0], TypeError, "tokens is list, expected how many each sequence gets"),
        ({0: 1, 1: 1.0}, TypeError, "tokens of sequence 1 are float, expected their number"),
        ({0: True}, TypeError, "tokens of sequence 0 are bool"),
        ({0: 1, 1: 0}, ValueError, "sequence 1 gets 0 tokens, expected at least one"),
        ({0: 1, 7: 1}, ValueError, r"there is no sequence 7; there are \[0, 1\]"),
        ({"0": 1}, ValueError, "there is no sequence '0'"),
    ],
)
def test_a_wrong_step_changes_nothing(tokens, error, message):
    cache = PagedKVCache(tiny().config, 4, 4)
    first, second = cache.add(), cache.add()
    with pytest.raises(error, match=message):
        cache.step(tokens)
    assert (cache.free_blocks, cache.length(first), cache.length(second)) == (4, 0, 0)


def engine():
    """A tiny model, patched, and a cache with two sequences of four tokens each."""
    torch.manual_seed(0)
    model = tiny(dtype=torch.float32)
    cache = PagedKVCache(model.config, 16, 4)
    return model, cache, [cache.add(), cache.add()]


@torch.no_grad()
def test_steps_of_equals_are_a_batch():
    model, cache, sequences = engine()
    ids = torch.randint(0, 64, (2, 7))
    expected = model(ids).logits
    for begin, end in (0, 4), (4, 6), (6, 7):
        step = cache.step(dict.fromkeys(sequences, end - begin))
        logits = model(ids[:, begin:end], position_ids=step.positions.view(2, -1), past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[:, begin:end], rtol=1e-4, atol=1e-4)
    step = cache.step({sequences[0]: 2, sequences[1]: 1})
    with pytest.raises(ValueError, match="take an attention_mask"):
        model(ids[:1, :3], position_ids=step.positions[None], past_key_values=cache)


@torch.no_grad()
def test_tokens_that_did_not_come_are_taken_back():
    model, cache, (one, _) = engine()
    ids = torch.randint(0, 64, (1, 6))
    expected = model(ids).logits
    cache.step({one: 4})  # and no call of the model
    assert cache.length(one) == 4
    cache.truncate(one, 0)
    for begin, end in (0, 4), (4, 6):
        cache.step({one: end - begin})
        logits = model(ids[:, begin:end], past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[:, begin:end], rtol=1e-4, atol=1e-4)
    cache.truncate(one, 3)  # two drafts and a token
    cache.step({one: 3})
    torch.testing.assert_close(model(ids[:, 3:], past_key_values=cache).logits, expected[:, 3:], rtol=1e-4, atol=1e-4)


def test_rows_can_be_freed_and_are_distinct():
    cache = PagedKVCache(tiny().config, 8, 4)
    keys = torch.zeros(2, 1, 3, 8)
    for layer in range(len(cache.layers)):
        cache.update(keys, keys, layer)
    cache.free(cache.rows[0])
    assert (cache.get_seq_length(), len(cache.rows)) == (3, 1)
    cache.reset()
    assert cache.free_blocks == 8
    again = cache.add()
    with pytest.raises(ValueError, match="expected each once"):
        cache.set_rows([again, again])
    with pytest.raises(ValueError, match="length is 5, but prefix_of is None"):
        cache.add(length=5)
    with pytest.raises(TypeError, match="config is int, expected the model's config"):
        PagedKVCache(3, 4)
