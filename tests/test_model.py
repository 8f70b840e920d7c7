"""The classifier and its batches: sizes, padding, pooling, and micro-batches that are the batch."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoder_shapes import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from lra import batches as batches_module
from lra.batches import Batches, resolve_micro_batches
from lra.build import count_parameters
from lra.tasks.base import Split
from models.classifier import Classifier
from models.dropout import Dropout
from models.encoder import EncoderShape, sinusoids

CPU = torch.device("cpu")
deterministic = settings(derandomize=True, deadline=None, max_examples=60)

LISTOPS = EncoderShape(
    layers=2,
    dim=64,
    heads=2,
    head_dim=32,
    ffn_dim=128,
    vocab_size=32,
    max_len=2048,
    dropout=0.1,
    attention_dropout=0.1,
    positions="learned",
    cls=False,
    projection_bias=True,
    norm_eps=1e-5,
    init="normal",
)
"""The ListOps model of Nystromformer's code."""

ATTENTIONS = {
    "softmax": ("softmax", {}),
    "cosformer": ("cosformer", {}),
    "linear": ("linear", {}),
    "linear-relu": ("linear", {"feature": "relu"}),
    "linear-leaky_relu": ("linear", {"feature": "leaky_relu"}),
    "linear-identity": ("linear", {"feature": "identity"}),
}
for_every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
for_both_poolings = pytest.mark.parametrize("pooling", ["mean_all", "mean_valid"])


def classifier(
    attention="cosformer", pooling="mean_all", shape=SMALL, dtype=torch.float64, **changed
):
    """Builds a classifier in evaluation mode; the same weights each time."""
    torch.manual_seed(0)
    name, options = ATTENTIONS[attention]
    head = {"num_classes": 10, "head_dims": [128], "pooling": pooling, "zero_is_padding": False}
    head |= {"dual": False, "nli_features": False}
    return Classifier(shape, name, options, **head | changed).to(dtype).eval()


def sequences(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, SMALL.vocab_size, (n,), generator=generator) for n in lengths]


def padded(examples, width, garbage_seed=None):
    """Returns tokens (B, width) and their key mask; padding is 0, or random token ids."""
    tokens = torch.zeros(len(examples), width, dtype=torch.long)
    if garbage_seed is not None:
        tokens = torch.stack(sequences(*[width] * len(examples), seed=garbage_seed))
    for row, example in zip(tokens, examples, strict=True):
        row[: len(example)] = example
    lengths = torch.tensor([len(example) for example in examples])
    return tokens, torch.arange(width) < lengths[:, None]


# Size


@for_every_attention
@for_both_poolings
def test_the_listops_model_has_the_published_number_of_parameters(attention, pooling):
    assert count_parameters(classifier(attention, pooling, LISTOPS)) == 209_802


# Dropout


def test_dropout_is_where_the_shape_says():
    model = classifier("softmax", shape=dataclasses.replace(LISTOPS, attention_dropout=0.25))
    elementwise = [module.p for module in model.modules() if isinstance(module, Dropout)]
    # After the embedding; after attention, inside and after the feed-forward of either layer.
    assert elementwise == [0.1] * 7
    assert [block.attention.attention.dropout for block in model.encoder.blocks] == [0.25] * 2


@pytest.mark.parametrize("shape", [(200, 500), (7, 11, 1301)])
@pytest.mark.parametrize("p", [0.1, 0.25])
def test_dropout_zeroes_entries_with_probability_p_and_scales_the_others(p, shape):
    torch.manual_seed(0)
    out = Dropout(p)(torch.ones(shape, dtype=torch.float64))
    kept = (out != 0).double()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / out.numel()) ** 0.5
    torch.testing.assert_close(out, kept / (1 - p), rtol=1e-5, atol=0)
    flat = (kept - (1 - p)).flatten() / (p * (1 - p)) ** 0.5
    for distance in (1, 2, 4, shape[-1]):
        pairs = flat[distance:] * flat[:-distance]
        assert abs(pairs.mean()) < 5 / len(pairs) ** 0.5


def test_dropped_entries_pass_no_gradient_and_kept_ones_a_scaled_one():
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64).T.requires_grad_()
    out = Dropout(0.25)(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(out == 0, 0.0, 4 / 3).double())
    torch.testing.assert_close(out, x * x.grad)


@pytest.mark.parametrize(("p", "training"), [(0.25, False), (0.0, True)])
def test_dropout_does_nothing_in_evaluation_or_at_zero(p, training):
    x, before = torch.randn(5, 6), torch.get_rng_state()
    assert torch.equal(Dropout(p).train(training)(x), x)
    assert torch.equal(torch.get_rng_state(), before)


@for_every_attention
def test_the_seed_of_torch_decides_all_dropout_of_a_step(attention):
    shape = dataclasses.replace(SMALL, dropout=0.1, attention_dropout=0.1)
    model = classifier(attention, shape=shape, dtype=torch.float32).train()
    batch = padded(sequences(5, 9), 9)

    def logits(seed):
        torch.manual_seed(seed)
        return model(*batch)

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))


# Padding and batch mates


@for_every_attention
@for_both_poolings
@pytest.mark.parametrize("width", [9, 10, 33, 64])
@pytest.mark.parametrize("garbage_seed", [None, 7], ids=["zeros", "garbage"])
def test_logits_depend_on_the_real_tokens_alone(attention, pooling, width, garbage_seed):
    model = classifier(attention, pooling)
    examples = sequences(5, 9, 1, 3)
    together = model(*padded(examples, width, garbage_seed))
    alone = torch.cat([model(example[None], None) for example in examples])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@for_every_attention
@for_both_poolings
def test_logits_depend_on_every_real_token_and_its_position(attention, pooling):
    model = classifier(attention, pooling)
    (tokens,) = sequences(6)
    logits = model(tokens[None], None)
    for at in range(6):
        changed = tokens.clone()
        changed[at] = tokens[at] % (SMALL.vocab_size - 1) + 1
        assert not torch.allclose(model(changed[None], None), logits, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(model(tokens.flip(0)[None], None), logits, rtol=1e-6, atol=1e-8)


@for_both_poolings
def test_a_full_mask_is_no_mask(pooling):
    model = classifier("softmax", pooling)
    tokens, key_mask = padded(sequences(8, 8), 8)
    torch.testing.assert_close(model(tokens, key_mask), model(tokens, None), rtol=0, atol=1e-12)


def test_a_sequence_of_the_greatest_length_is_taken():
    model = classifier()
    (tokens,) = sequences(SMALL.max_len)
    assert model(tokens[None], None).isfinite().all()


# Pooling


def encoded_and_pooled(model, tokens, key_mask):
    """Returns what the encoder gives and what the head takes."""
    seen = {}
    model.encoder.register_forward_hook(lambda _, __, out: seen.update(encoded=out))
    model.head.register_forward_pre_hook(lambda _, inputs: seen.update(pooled=inputs[0]))
    model(tokens, key_mask)
    return seen["encoded"], seen["pooled"]


@pytest.mark.parametrize("garbage_seed", [None, 7], ids=["zeros", "garbage"])
@pytest.mark.parametrize(
    ("pooling", "divisors"), [("mean_all", [64, 64, 64]), ("mean_valid", [5, 9, 1])]
)
def test_pooling_sums_the_real_rows_and_divides(pooling, divisors, garbage_seed):
    lengths = [5, 9, 1]
    tokens, key_mask = padded(sequences(*lengths), 12, garbage_seed)
    encoded, pooled = encoded_and_pooled(classifier(pooling=pooling), tokens, key_mask)
    for row, n, divisor, got in zip(encoded, lengths, divisors, pooled, strict=True):
        torch.testing.assert_close(got, row[:n].sum(0) / divisor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("pooling", "divisor"), [("mean_all", 64), ("mean_valid", 6)])
def test_pooling_without_padding_divides_by_the_same(pooling, divisor):
    tokens = torch.stack(sequences(6, 6))
    encoded, pooled = encoded_and_pooled(classifier(pooling=pooling), tokens, None)
    torch.testing.assert_close(pooled, encoded.sum(1) / divisor, rtol=1e-12, atol=1e-12)


def test_pooling_over_holes_counts_the_real_tokens():
    tokens = torch.stack(sequences(4))
    key_mask = torch.tensor([[True, False, True, False]])
    encoded, pooled = encoded_and_pooled(classifier(pooling="mean_valid"), tokens, key_mask)
    expected = (encoded[:, 0] + encoded[:, 2]) / 2
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


def test_the_plain_mean_takes_all_positions_but_right_padding():
    model = classifier(pooling="mean", zero_is_padding=True)
    tokens, key_mask = padded([torch.tensor([3, 0, 4, 0]), torch.tensor([5, 6])], 4)
    encoded, pooled = encoded_and_pooled(model, tokens, key_mask)
    expected = torch.stack([encoded[0].mean(0), encoded[1, :2].mean(0)])
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=1e-12)


def test_the_first_position_is_that_of_the_first_token():
    tokens, key_mask = padded(sequences(5, 9), 12)
    encoded, pooled = encoded_and_pooled(classifier(pooling="first"), tokens, key_mask)
    assert encoded.shape[1] == 12
    assert torch.equal(pooled, encoded[:, 0])


WITH_CLS = dataclasses.replace(SMALL, cls=True)


@pytest.mark.parametrize("attention", ["softmax", "cosformer"])
def test_a_cls_vector_stands_before_the_tokens_and_is_pooled(attention):
    model = classifier(attention, "cls", WITH_CLS)
    tokens, key_mask = padded(sequences(5, 9), 12)
    encoded, pooled = encoded_and_pooled(model, tokens, key_mask)
    assert encoded.shape[1] == 13
    assert torch.equal(pooled, encoded[:, 0])
    for example, logits in zip(sequences(5, 9), model(tokens, key_mask), strict=True):
        torch.testing.assert_close(model(example[None], None)[0], logits, rtol=1e-9, atol=1e-12)


def test_a_cls_vector_costs_itself_and_a_position():
    def size(shape):
        return count_parameters(classifier(shape=shape))

    assert size(WITH_CLS) - size(SMALL) == 2 * SMALL.dim
    (tokens,) = sequences(SMALL.max_len)
    assert classifier(pooling="cls", shape=WITH_CLS)(tokens[None], None).isfinite().all()


# Token 0


@for_every_attention
def test_token_0_is_as_good_as_masked_where_it_is_padding(attention):
    tokens = torch.tensor([[0, 3, 0, 0, 4, 5, 0]])
    masked = classifier(attention, "mean_valid", zero_is_padding=True)(tokens, None)
    by_hand = classifier(attention, "mean_valid")(tokens, tokens != 0)
    torch.testing.assert_close(masked, by_hand, rtol=1e-12, atol=1e-12)
    seen = classifier(attention, "mean_valid")(tokens, None)
    assert not torch.allclose(masked, seen, rtol=1e-3)


def test_an_example_of_nothing_but_padding_has_finite_logits_and_gradients():
    model = classifier("softmax", "mean_valid", zero_is_padding=True)
    logits = model(torch.zeros(2, 5, dtype=torch.long), None)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


# Positions and initial weights


def test_sinusoidal_positions_are_those_of_the_formula_and_are_not_trained():
    table = sinusoids(50, 6)
    for at in (0, 1, 17, 49):
        for channel in range(6):
            angle = at / 10_000 ** (2 * (channel // 2) / 6)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[at, channel].item() == pytest.approx(expected, abs=1e-5)
    learned = count_parameters(classifier())
    fixed = count_parameters(classifier(shape=dataclasses.replace(SMALL, positions="sinusoidal")))
    assert learned - fixed == SMALL.max_len * SMALL.dim


def test_xavier_is_uniform_with_the_fan_of_each_projection_and_small_biases():
    shape = dataclasses.replace(LISTOPS, dim=256, ffn_dim=512, init="xavier", head_dim=64)
    model = classifier("softmax", shape=shape)
    block = model.encoder.blocks[0]
    weights = [*block.attention.project.weight.chunk(3), block.attention.out.weight]
    weights += [block.ffn[0].weight, block.ffn[3].weight]
    for weight in weights:
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert block.ffn[0].bias.abs().max() < 1e-5
    assert model.encoder.tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    first, last = model.head[0], model.head[2]
    assert first.weight.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert last.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)
    assert not first.bias.any()


def test_projections_without_bias_have_none():
    model = classifier("softmax", shape=dataclasses.replace(SMALL, projection_bias=False))
    attention = model.encoder.blocks[0].attention
    assert attention.project.bias is attention.out.bias is None
    difference = count_parameters(classifier("softmax")) - count_parameters(model)
    assert difference == SMALL.layers * 4 * SMALL.dim


# Two sequences an example


def pairs_of(count=3):
    """Returns (B, 2, N) tokens and key mask of pairs of different lengths."""
    rows = [padded(sequences(4 + i, 9 - i, seed=i), 10) for i in range(count)]
    return torch.stack([tokens for tokens, _ in rows]), torch.stack([mask for _, mask in rows])


@pytest.mark.parametrize("nli_features", [False, True])
def test_a_dual_model_encodes_both_sequences_alike_and_its_head_sees_both(nli_features):
    model = classifier("softmax", "mean_valid", dual=True, nli_features=nli_features)
    single = classifier("softmax", "mean_valid", head_dims=[7])
    single.encoder.load_state_dict(model.encoder.state_dict())
    tokens, key_mask = pairs_of()
    x1, x2 = (
        encoded_and_pooled(single, tokens[:, i], key_mask[:, i])[1].detach() for i in range(2)
    )
    features = [x1, x2, x1 * x2, x1 - x2] if nli_features else [x1, x2]
    expected = model.head(torch.cat(features, -1))
    torch.testing.assert_close(model(tokens, key_mask), expected, rtol=1e-9, atol=1e-12)


def test_pairs_of_one_length_need_no_mask():
    model = classifier("cosformer", "mean_valid", dual=True, nli_features=True)
    tokens = pairs_of()[0] % 11 + 1
    full = torch.ones_like(tokens, dtype=torch.bool)
    torch.testing.assert_close(model(tokens, None), model(tokens, full), rtol=1e-9, atol=1e-12)


def test_the_head_has_as_many_layers_as_it_is_given():
    model = classifier(dual=True, head_dims=[20, 6])
    sizes = [(layer.in_features, layer.out_features) for layer in model.head[::2]]
    assert sizes == [(32, 20), (20, 6), (6, 10)]
    assert [type(layer).__name__ for layer in model.head[1::2]] == ["ReLU", "ReLU"]


# Batches


def split_of(lengths, dtype=np.uint8, seed=0):
    """Returns a split of random tokens, read-only as from a memory map."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    top = min(np.iinfo(dtype).max, 500)
    tokens = rng.integers(1, top, offsets[-1], endpoint=True).astype(dtype)
    split = Split.of(tokens, offsets, rng.integers(0, 10, len(lengths)).astype(np.uint8))
    for array in (split.tokens, split.labels):
        array.setflags(write=False)
    return split


lengths_of_a_split = st.one_of(
    st.lists(st.integers(1, 12), min_size=1, max_size=40),
    st.integers(1, 12).flatmap(
        lambda n: st.lists(st.just(n), min_size=1, max_size=40)
    ),  # all of equal length
)
splits = st.builds(
    split_of, lengths_of_a_split, st.sampled_from([np.uint8, np.uint16]), st.integers(0, 99)
)
batch_sizes = st.integers(1, 50)  # also larger than the split
pieces_of_a_batch = st.integers(1, 6)
seeds = st.integers(0, 2**32)


def assert_holds_its_examples(batch, split, multiple=1):
    """Checks a micro-batch against the split, token by token."""
    indices = batch.indices.tolist()
    examples = [split[i] for i in indices]
    lengths = [len(example) for example in examples]
    width = min(-(-max(lengths) // multiple) * multiple, split.lengths.max())
    assert batch.tokens.shape == (len(indices), width)
    assert batch.tokens.dtype == torch.int32
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert batch.labels.tolist() == split.labels[indices].tolist()
    assert batch.num_tokens == sum(lengths)
    assert (batch.key_mask is None) == (min(lengths) == width)
    for row, example in zip(batch.tokens.tolist(), examples, strict=True):
        assert row == example.tolist() + [0] * (width - len(example))
    if batch.key_mask is not None:
        assert batch.key_mask.dtype == torch.bool
        assert batch.key_mask.tolist() == [[i < n for i in range(width)] for n in lengths]


def indices_of(pieces):
    return [index for piece in pieces for index in piece.indices.tolist()]


def steps_an_epoch(split, batch_size):
    return len(split) // min(batch_size, len(split))


@given(splits, batch_sizes, pieces_of_a_batch, seeds)
@deterministic
def test_an_epoch_has_each_example_once_but_for_its_incomplete_last_batch(
    split, batch_size, pieces, seed
):
    data, size = Batches(split, CPU), min(batch_size, len(split))
    steps = steps_an_epoch(split, batch_size)
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = data.training(step, batch_size, pieces, seed)
            assert len(indices_of(batch)) == size
            seen += indices_of(batch)
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(len(split)))
        assert len(split) - len(seen) == len(split) % size


@given(splits, batch_sizes, pieces_of_a_batch, seeds)
@deterministic
def test_micro_batches_hold_their_examples_in_order_of_length(split, batch_size, pieces, seed):
    batch = Batches(split, CPU).training(0, batch_size, pieces, seed)
    size = min(batch_size, len(split))
    assert len(batch) == min(pieces, size)
    assert max(len(b.labels) for b in batch) - min(len(b.labels) for b in batch) <= 1
    for piece in batch:
        assert_holds_its_examples(piece, split)
    lengths = [len(split[index]) for index in indices_of(batch)]
    assert lengths == sorted(lengths, reverse=True)


@given(splits, batch_sizes, pieces_of_a_batch, seeds)
@deterministic
def test_in_bf16_on_cpu_few_widths_recur(split, batch_size, pieces, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "WIDTH_MULTIPLE", 8)
        data = Batches(split, CPU, precision="bf16")
    batch = data.training(0, batch_size, pieces, seed)
    exact = Batches(split, CPU).training(0, batch_size, pieces, seed)
    assert sorted(indices_of(batch)) == sorted(indices_of(exact))
    for piece in [*batch, *data.evaluation()]:
        assert_holds_its_examples(piece, split, multiple=8)


@given(splits, st.integers(1, 200))
@deterministic
def test_evaluation_has_each_example_once(split, budget):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches_module, "CPU_TOKENS", budget)
        batches = list(Batches(split, CPU).evaluation())
    assert sorted(indices_of(batches)) == list(range(len(split)))
    for batch in batches:
        assert_holds_its_examples(batch, split)
        assert batch.tokens.numel() <= budget or len(batch.labels) == 1


@given(splits, batch_sizes, pieces_of_a_batch, st.integers(0, 30), seeds)
@deterministic
def test_any_step_can_be_asked_for_directly(split, batch_size, pieces, step, seed):
    gone_through = Batches(split, CPU)
    for earlier in range(step):
        gone_through.training(earlier, batch_size, pieces, seed)
    resumed = Batches(split, CPU)
    expected = resumed.training(step, batch_size, pieces, seed)
    got = gone_through.training(step, batch_size, pieces, seed)
    assert [piece.indices.tolist() for piece in got] == [p.indices.tolist() for p in expected]


@given(splits, batch_sizes, pieces_of_a_batch, st.integers(0, 30), seeds)
@deterministic
def test_the_number_of_pieces_does_not_change_the_batch(split, batch_size, pieces, step, seed):
    data = Batches(split, CPU)
    whole = data.training(step, batch_size, 1, seed)
    assert indices_of(data.training(step, batch_size, pieces, seed)) == indices_of(whole)


def test_every_seed_and_epoch_has_an_order_of_its_own():
    data = Batches(split_of([3] * 100), CPU)
    orders = [
        indices_of(data.training(epoch, 100, 1, seed)) for seed in range(3) for epoch in range(3)
    ]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9


def test_the_order_does_not_depend_on_torchs_generator_or_on_another_seed_in_between():
    data = Batches(split_of(range(1, 51)), CPU)
    torch.manual_seed(1)
    first = indices_of(data.training(3, 8, 2, 5))
    torch.manual_seed(2)
    assert indices_of(data.training(3, 8, 2, 6)) != first
    assert indices_of(data.training(3, 8, 2, 5)) == first


def test_the_order_does_not_depend_on_the_examples():
    # Only ties in length are broken by the permutation, so that equal lengths show it.
    one, other = (Batches(split_of([n] * 50, seed=n), CPU) for n in (3, 4))
    assert indices_of(one.training(2, 8, 1, 0)) == indices_of(other.training(2, 8, 1, 0))


@pytest.mark.parametrize(
    ("setting", "batch_size", "lengths", "expected"),
    [
        ("auto", 60, [5, 9], 6),
        ("auto", 32, [5, 9], 4),  # padding is saved where lengths differ
        ("auto", 3, [5, 9], 3),
        ("auto", 10, [10, 10], 1),
        ("auto", 11, [10, 10], 2),
        ("auto", 2, [500], 2),
        (1, 32, [5, 9], 1),
        (7, 32, [5, 9], 7),
        (64, 32, [5, 9], 32),
    ],
)
def test_micro_batches_are_as_few_as_hold_the_batch_within_the_budget(
    monkeypatch, setting, batch_size, lengths, expected
):
    monkeypatch.setattr(batches_module, "CPU_TOKENS", 100)
    assert resolve_micro_batches(setting, batch_size, np.array(lengths), CPU) == expected


def test_a_gpu_takes_the_batch_whole():
    assert resolve_micro_batches("auto", 32, np.array([5, 9]), torch.device("cuda")) == 1


# Micro-batches are the batch


def loss_and_gradient(model, pieces):
    """Returns the summed loss of (tokens, key_mask, labels) triples and its gradient, as one."""
    model.zero_grad()
    total = 0.0
    for tokens, key_mask, labels in pieces:
        loss = F.cross_entropy(model(tokens, key_mask), labels, reduction="sum")
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


@for_every_attention
@for_both_poolings
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_micro_batches_have_the_loss_and_gradient_of_the_whole_batch(
    attention, pooling, dtype, tolerance
):
    lengths = np.random.default_rng(0).integers(3, 41, size=20)
    split = split_of(lengths)
    split = dataclasses.replace(split, tokens=split.tokens % SMALL.vocab_size)
    pieces = Batches(split, CPU).training(step=0, batch_size=13, pieces=4, seed=0)
    assert len({piece.tokens.shape[1] for piece in pieces}) == 4

    indices = indices_of(pieces)
    examples = [torch.from_numpy(split[index].astype(np.int64)) for index in indices]
    tokens, key_mask = padded(examples, max(lengths[indices]))
    labels = torch.from_numpy(split.labels[indices].astype(np.int64))

    if (attention, dtype) == ("linear-identity", torch.float32):
        tolerance = 1e-5  # Its row sums come close to 0, which magnifies rounding.
    model = classifier(attention, pooling, dtype=dtype).train()
    loss, gradient = loss_and_gradient(model, [piece[:3] for piece in pieces])
    whole_loss, whole_gradient = loss_and_gradient(model, [(tokens, key_mask, labels)])
    assert loss == pytest.approx(whole_loss, rel=tolerance)
    assert (gradient - whole_gradient).norm() <= tolerance * whole_gradient.norm()


# Batches of pairs


def split_of_pairs(count=30, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 12, 2 * count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = rng.integers(1, SMALL.vocab_size, offsets[-1]).astype(np.uint8)
    return Split.of(tokens, offsets, rng.integers(0, 2, count).astype(np.uint8))


def test_pairs_are_padded_to_the_longest_sequence_of_any():
    split = split_of_pairs()
    data = Batches(split, CPU)
    assert data.widths.tolist() == (2 * split.lengths.max(1)).tolist()
    for batch in [*data.training(0, 12, 3, seed=0), *data.evaluation()]:
        indices = batch.indices.tolist()
        width = split.lengths[indices].max()
        assert batch.tokens.shape == batch.key_mask.shape == (len(indices), 2, width)
        assert batch.num_tokens == split.lengths[indices].sum()
        assert batch.labels.tolist() == split.labels[indices].tolist()
        for pair, mask, index in zip(batch.tokens, batch.key_mask, indices, strict=True):
            for part in range(2):
                assert pair[part][mask[part]].tolist() == split[index, part].tolist()
                assert not pair[part][~mask[part]].any()


def test_every_pair_is_evaluated_once():
    split = split_of_pairs()
    seen = [i for batch in Batches(split, CPU).evaluation() for i in batch.indices.tolist()]
    assert sorted(seen) == list(range(len(split)))


def test_micro_batches_of_pairs_have_the_gradient_of_the_whole_batch():
    split = split_of_pairs()
    model = classifier("cosformer", "mean_valid", dual=True, nli_features=True)
    data = Batches(split, CPU)
    whole = loss_and_gradient(model, [data.gather(np.arange(30))[:3]])
    order = np.argsort(-data.widths)
    pieces = loss_and_gradient(model, [data.gather(p)[:3] for p in np.array_split(order, 4)])
    assert pieces[0] == pytest.approx(whole[0], rel=1e-12)
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-9, atol=1e-12)
