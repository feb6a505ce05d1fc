import dataclasses
import functools
import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_test_mesh
from flax import nnx

from gpt_pretrain import generate
from gpt_pretrain.data.stages import Stage, Stream
from gpt_pretrain.model import gpt as llm
from gpt_pretrain.model import layers as transformer
from gpt_pretrain.model import statistics as metrics
from gpt_pretrain.model.document_mask import documents_of
from gpt_pretrain.model.gpt import GPT, GPTConfig, graph_of, init_params
from gpt_pretrain.model.perturbations import Perturbation, scaling
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.parallel.mesh import batch_layout, batch_sharding
from gpt_pretrain.train import state as train_state
from gpt_pretrain.train import step as train_step
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.report import say_what_runs

SEQ_LEN, NUM_VALID, END = 16, 257, 256
HOW = {"seq_len": SEQ_LEN, "num_valid": NUM_VALID, "num_chunks": 2, "seed": 0}
# Begins inside a document; two end-of-texts in a row; one at the last position.
LENGTHS = (4, 5, 1, 5, 1)
WINDOW = np.array([7, 8, 9, 10, END, 11, 12, 13, 14, END, END, 15, 16, 17, 18, END])
HALVED = Perturbation(functools.partial(scaling, factor=0.5), sites=["attn_out"])
BOUNDS = list(zip(np.cumsum((0, *LENGTHS[:-1])).tolist(), np.cumsum(LENGTHS).tolist(), strict=True))


@pytest.fixture(scope="module")
def config():
    return GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=264).resolve("cpu")


@pytest.fixture(scope="module")
def params(config):
    return sharp_params(config, SEQ_LEN)


def sharp_params(config, seq_len):
    """Far from uniform attention and with strong positions, so that mistakes show."""
    return jax.tree.map(lambda leaf: leaf * 8, init_params(config, seq_len, jax.random.key(0)))


def logits_fn(config, params, *, masked, rng=None):
    @jax.jit
    def logits(tokens_BT):
        model = nnx.merge(graph_of(config, SEQ_LEN), params)
        return model.logits(model(tokens_BT, documents=documents_of(tokens_BT, END) if masked else None, rng=rng))

    return lambda tokens_T: np.asarray(logits(jnp.asarray(tokens_T)[None])[0])


def random_documents(shape, doc_len, seed=0):
    """(*shape, n * doc_len + 1) ids, of which every `doc_len`-th begins a document."""
    tokens = np.random.default_rng(seed).integers(0, END, shape)
    tokens[..., ::doc_len] = END
    return tokens.astype(np.uint16)


def assert_close(found, expected, rtol=2e-4, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


@pytest.mark.parametrize(
    "tokens, segment_ids, positions",
    [
        ([5, 6, END, 7, 8, END], [0, 0, 1, 1, 1, 2], [0, 1, 0, 1, 2, 0]),
        ([END, 5, END, END, 6, 7], [1, 1, 2, 3, 3, 3], [0, 1, 0, 0, 1, 2]),
        ([5, 6, 7, 8, 9, 10], [0] * 6, [0, 1, 2, 3, 4, 5]),
        ([END] * 6, [1, 2, 3, 4, 5, 6], [0] * 6),
    ],
)
def test_a_document_begins_at_its_end_of_text_and_positions_restart_there(tokens, segment_ids, positions):
    found = documents_of(jnp.array([tokens, tokens[::-1]]), END)
    assert found.segment_ids_BT[0].tolist() == segment_ids and found.positions_BT[0].tolist() == positions
    assert {leaf.dtype for leaf in found} == {jnp.dtype("int32")}


def test_a_document_has_the_logits_it_has_alone(config, params):
    packed = logits_fn(config, params, masked=True)(WINDOW)
    plain = logits_fn(config, params, masked=False)
    for start, stop in BOUNDS:
        alone = plain(np.pad(WINDOW[start:stop], (0, SEQ_LEN - (stop - start))))  # causal: padding does not matter
        assert_close(packed[start:stop], alone[: stop - start], atol=1e-4)
    together = plain(WINDOW)
    assert_close(packed[:4], together[:4], atol=1e-4)
    assert not np.allclose(packed[4:], together[4:], atol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"dtype": "bfloat16"}])
def test_no_token_of_a_document_reaches_another(config, params, changes):
    """With dropout: its path writes attention out, under the same masks of dropout."""
    config = dataclasses.replace(config, **changes)
    logits = logits_fn(config, params, masked=True, rng=jax.random.key(1) if config.dropout else None)
    before = logits(WINDOW)
    for start, stop in BOUNDS:
        for t in range(start, stop):
            if WINDOW[t] == END:
                continue
            changed = WINDOW.copy()
            changed[t] += 100
            after = logits(changed)
            same = np.ones(SEQ_LEN, bool)
            same[t:stop] = False  # the rest of its own document, and nothing else
            assert np.array_equal(before[same], after[same])
            assert (before[t] != after[t]).any()


def test_dropout_of_rate_zero_attends_as_without(params):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, SEQ_LEN, 2, 8))
    segment_ids = documents_of(jnp.stack([WINDOW, WINDOW[::-1]]), END).segment_ids_BT
    found = transformer.causal_attention_with_dropout(0.0, jax.random.key(0), segment_ids)(0, q, k, v)
    assert_close(found, transformer.causal_attention("xla", segment_ids)(0, q, k, v), atol=1e-5)


def test_the_gradient_is_that_of_the_documents_one_by_one_with_hooks_and_remat_too(config, params):
    config = dataclasses.replace(config, perturbations=(HALVED,))
    how = {"num_valid": NUM_VALID, "num_chunks": 1}
    window = np.append(WINDOW, 19).astype(np.uint16)
    plain = train_step.make_loss_fn(config, seq_len=SEQ_LEN, **how)

    @jax.jit
    def one_by_one(p):
        sums = []
        for length in set(LENGTHS):  # mean of the documents of this length, times their share of the tokens
            rows = np.stack([window[start : stop + 1] for start, stop in BOUNDS if stop - start == length])
            found = train_step.accumulate_gradients(plain, p, rows[None], None)
            share = len(rows) * length / SEQ_LEN
            sums.append(jax.tree.map(lambda leaf, share=share: share * leaf, found))
        return jax.tree.map(lambda *leaves: sum(leaves), *sums)

    expected = one_by_one(params)
    for remat in (False, True):
        masked = dataclasses.replace(config, remat=remat)
        loss_fn = train_step.make_loss_fn(masked, seq_len=SEQ_LEN, document_end=END, **how)
        found = jax.jit(lambda p, f=loss_fn: train_step.accumulate_gradients(f, p, window[None, None], None))(params)
        assert_close(found, expected, rtol=1e-3, atol=1e-5)


# A window of two documents of 8 tokens each is, with the mask, two windows of 8 without: in every number.
# The model has SEQ_LEN positions for both.


@pytest.fixture(scope="module")
def two_documents():
    """(num_microbatches, rows, 17) packed; (num_microbatches, 2 * rows, 9) the same documents apart."""
    packed = random_documents((2, 4, SEQ_LEN + 1), 8)
    return packed, np.concatenate([packed[..., :9], packed[..., 8:]], axis=1)


HALF = HOW | {"seq_len": 8, "num_chunks": 1}


def make_step(config, mesh, how):
    optimizer = adamw(100, lr=1e-2, warmup_steps=2)
    args = (config, how["seq_len"], optimizer.transform, mesh)
    shardings = train_state.state_shardings(*args)
    step = train_step.make_train_step(config, optimizer, mesh=mesh, **how)
    return train_state.create(*args, 0), train_step.compile_train_step(step, shardings, mesh)


def losses_of(config, mesh, how, batch, num_steps=4):
    state, step = make_step(config, mesh, how)
    rows = []
    for _ in range(num_steps):
        state, found = step(state, jax.device_put(batch, batch_sharding(mesh)))
        rows.append([float(found[name]) for name in ("loss", "grad_norm", "param_norm", "update_norm")])
    return np.array(rows)


def test_packed_documents_on_four_devices_train_like_the_same_documents_apart_on_one(config, two_documents):
    config = dataclasses.replace(config, block_size=SEQ_LEN, n_layer=1)
    packed, apart = two_documents
    one_device = losses_of(config, make_test_mesh(1, 1), HALF, apart)
    four_devices = losses_of(config, make_test_mesh(2, 2), HOW | {"document_end": END}, packed)
    assert one_device[-1, 0] < one_device[0, 0]
    np.testing.assert_allclose(four_devices, one_device, rtol=2e-5)


def test_validation_loss_uses_the_mask(config, params, two_documents):
    config = dataclasses.replace(config, block_size=SEQ_LEN)
    packed, apart = (batch[:1] for batch in two_documents)

    def evaluate(how, batch, weights):
        return jax.jit(train_step.make_eval_step(config, **how))(params, batch, np.array([weights], np.float32), 0)

    found = evaluate(HOW | {"document_end": END}, packed, [1, 1, 0, 1])
    assert_close(found, evaluate(HALF, apart, [1, 1, 0, 1] * 2))
    assert abs(found[0] / evaluate(HOW, packed, [1, 1, 0, 1])[0] - 1) > 1e-2


def test_statistics_are_those_of_the_masked_step(config, params, two_documents):
    config = dataclasses.replace(config, block_size=SEQ_LEN, remat=True, n_layer=1)
    params = params | {"blocks": {0: params["blocks"][0]}}
    packed, apart = (batch[:1] for batch in two_documents)
    state = train_state.TrainState(jnp.int32(0), params, ())
    found = jax.jit(train_step.make_statistics(config, document_end=END, **HOW))(state, packed)
    expected = jax.jit(train_step.make_statistics(config, **HALF))(state, apart)
    assert found.keys() == expected.keys() and len(found) > 12
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_fsdp_with_the_mask_still_moves_no_activations():
    mesh, seq_len = make_test_mesh(1, 4), 128
    config = GPTConfig(n_layer=1, n_head=2, n_embd=256, vocab_size=2048).resolve("cpu")
    how = {"seq_len": seq_len, "num_valid": 2048, "num_chunks": 1, "mesh": mesh, "document_end": 0}
    optimizer = adamw(9, warmup_steps=0)
    abstract = train_state.abstract(config, seq_len, optimizer.transform, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = train_step.make_train_step(config, optimizer, seed=0, **how)
    batch = jax.ShapeDtypeStruct((2, 8, seq_len + 1), jnp.uint16, sharding=batch_sharding(mesh))
    compiled = train_step.compile_train_step(step, shardings, mesh).lower(abstract, batch).compile().as_text()
    results = re.findall(r"= (.+?) (?:all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)\(", compiled)
    shapes = {tuple(map(int, dims.split(","))) for result in results for dims in re.findall(r"\[([\d,]+)\]", result)}
    weights = {leaf.shape for leaf in jax.tree.leaves(abstract.params)}
    assert weights & shapes and not [shape for shape in shapes if len(shape) > 2], shapes - weights


def test_the_mask_that_is_off_leaves_no_trace_in_the_lowered_functions(config, monkeypatch):
    mesh = make_test_mesh(1, 1)

    def lowered(config, **how):
        optimizer = adamw(100, warmup_steps=2)
        state = train_state.abstract(config, SEQ_LEN, optimizer.transform, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        make = train_step.make_train_step(config, optimizer, mesh=mesh, **HOW, **how)
        step = train_step.compile_train_step(make, shardings, mesh)
        batch, rows = (jax.ShapeDtypeStruct((n, 4, SEQ_LEN + 1), jnp.uint16) for n in (2, 1))
        weights = jax.ShapeDtypeStruct((1, 4), jnp.float32)
        evaluate = train_step.compile_eval_step(train_step.make_eval_step(config, **HOW, **how), shardings, mesh)
        statistics = train_step.compile_statistics(train_step.make_statistics(config, **HOW, **how), shardings, mesh)
        return [
            step.lower(state, batch).as_text(),
            evaluate.lower(state.params, rows, weights, 0).as_text(),
            statistics.lower(state, batch).as_text(),
        ]

    def model_that_knows_no_documents(self, tokens_BT, *, documents, hook, rng=None):
        rate = self.config.dropout
        rng_embed = rng_blocks = None
        if rng is not None and rate:
            rng_embed, rng_attend, rng_blocks = jax.random.split(rng, 3)
        positions_T = 0 + jnp.arange(tokens_BT.shape[1])
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
        x_BTD = llm.dropout(x_BTD.astype(self.config.dtype), rate, rng_embed)

        def attend(layer, q_BTHK, k_BTHK, v_BTHK):
            if rng is None or not rate:
                return jax.nn.dot_product_attention(q_BTHK, k_BTHK, v_BTHK, is_causal=True, implementation="xla")
            scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK, preferred_element_type=jnp.float32)
            scores_BHTS = scores_BHTS / jnp.sqrt(q_BTHK.shape[-1])
            is_past = jnp.tril(jnp.ones((SEQ_LEN, SEQ_LEN), bool))
            probs_BHTS = jax.nn.softmax(jnp.where(is_past, scores_BHTS, -jnp.inf), axis=-1)
            probs_BHTS = llm.dropout(probs_BHTS, rate, jax.random.fold_in(rng_attend, layer))
            return jnp.einsum("bhts,bshk->bthk", probs_BHTS.astype(v_BTHK.dtype), v_BTHK)

        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, layer, attend=attend, hook=hook, rng=rng_blocks)
        return self.ln_f(x_BTD)

    configs = [dataclasses.replace(config, n_layer=1, dropout=rate) for rate in (0.0, 0.1)]
    off = [lowered(each) for each in configs]
    on = [lowered(each, document_end=END) for each in configs]
    monkeypatch.setattr(GPT, "__call__", model_that_knows_no_documents)
    for each, found, masked in zip(configs, off, on, strict=True):
        for without, text, other in zip(lowered(each), found, masked, strict=True):
            assert text == without
            assert other != without and "cummax" in other and "cummax" not in text


def test_cudnn_cannot_have_the_mask_and_auto_chooses_xla():
    assert GPTConfig().resolve("gpu").attention == "cudnn"
    assert GPTConfig().resolve("gpu", document_mask=True).attention == "xla"
    assert GPTConfig().resolve("cpu", document_mask=True).attention == "xla"
    with pytest.raises(ValueError, match=r"model.attention='cudnn' cannot keep attention within documents.*'xla'"):
        GPTConfig(attention="cudnn").resolve("gpu", document_mask=True)
    with pytest.raises(AssertionError, match="refuses cudnn"):  # a caller that forgot to say so is not obeyed silently
        transformer.causal_attention("cudnn", jnp.zeros((1, 4), jnp.int32))


def test_the_run_says_whether_attention_stays_within_documents(config, caplog):
    dataset = SimpleNamespace(directory="d", format="bin", fingerprint="f", unigram_entropy=None)
    stage = Stage(seed=0, seq_len=SEQ_LEN, batch_sizes=((0, 4),), streams=(Stream("", "f", 99),))
    for block_size, mask, words in ((None, False, "attention by xla"), (32, True, "attention by xla within documents")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            say_what_runs(
                {"": dataset},
                dataclasses.replace(config, block_size=block_size),
                batch_layout(4, 4, 1),
                make_test_mesh(1, 1),
                num_params=5,
                stage=stage,
                document_mask=mask,
            )
        line = next(message for message in caplog.messages if message.startswith("Model"))
        assert line.endswith(words) and f"{block_size or SEQ_LEN} positions" in line


def test_sampling_sees_the_last_document_of_the_prompt_and_ends_with_it(config, params):
    prompt = WINDOW[:7]  # the end of one document, the beginning of another
    how = {"seq_len": SEQ_LEN, "num_valid": NUM_VALID, "temperature": 0.0}
    new = generate.sample(params, config, prompt, num_tokens=6, document_end=END, **how)
    logits = logits_fn(config, params, masked=True)
    tokens = prompt.tolist()
    while len(tokens) < 13:
        padded = np.pad(tokens, (0, SEQ_LEN - len(tokens)))
        tokens.append(int(logits(padded)[len(tokens) - 1, :NUM_VALID].argmax()))
    assert END not in tokens[7:] and new.tolist() == tokens[7:]
    assert new.tolist() != generate.sample(params, config, prompt, num_tokens=6, **how).tolist()

    table = params["token_embedding"]["embedding"]
    ending = params | {"ln_f": {"scale": 0 * table[END], "bias": table[END] / abs(table[END]).max()}}
    ending["token_embedding"] = {"embedding": table.at[END].mul(9)}  # end-of-text is always the likeliest
    assert generate.sample(ending, config, prompt, num_tokens=6, **how).tolist() == [END] * 6
    assert generate.sample(ending, config, prompt, num_tokens=6, document_end=END, **how).tolist() == []


# --- block_size ---


def test_the_position_table_has_block_size_rows_and_shorter_sequences_use_its_front(config):
    longer = dataclasses.replace(config, block_size=64)
    params = sharp_params(longer, SEQ_LEN)
    table = params["position_embedding"]["embedding"]
    assert table.shape[0] == 64 == longer.num_positions(SEQ_LEN) and config.num_positions(SEQ_LEN) == SEQ_LEN
    front = params | {"position_embedding": {"embedding": table[:SEQ_LEN]}}
    found, expected = (logits_fn(c, p, masked=False)(WINDOW) for c, p in ((longer, params), (config, front)))
    assert np.array_equal(found, expected)
    assert longer.shape == config.shape  # the table's size is compared as num_positions


def test_shorter_sequences_train_the_front_of_the_table_and_longer_ones_go_on_from_it(config):
    config = dataclasses.replace(config, block_size=2 * SEQ_LEN, n_layer=1)
    params = train_state.init_params(config, SEQ_LEN, jax.random.key(0))
    how = {"num_valid": NUM_VALID, "num_chunks": 1}
    long = jax.random.randint(jax.random.key(0), (4, 2 * SEQ_LEN + 1), 0, NUM_VALID).astype(jnp.uint16)
    trained = {}
    for seq_len in (SEQ_LEN, 2 * SEQ_LEN):
        grad = jax.jit(jax.grad(train_step.make_loss_fn(config, seq_len=seq_len, **how), has_aux=True))
        grads, _ = grad(params, long[:, : seq_len + 1], None)
        trained[seq_len] = np.asarray(grads["position_embedding"]["embedding"]).any(-1).tolist()
    assert trained == {SEQ_LEN: [True] * SEQ_LEN + [False] * SEQ_LEN, 2 * SEQ_LEN: [True] * 2 * SEQ_LEN}


def test_sequences_longer_than_block_size_are_refused(config):
    short = dataclasses.replace(config, block_size=8)
    message = r"data\.seq_len=16 is longer than model\.block_size=8"
    for attempt in (
        lambda: short.num_positions(SEQ_LEN),
        lambda: train_state.create(short, SEQ_LEN, adamw(9, warmup_steps=0).transform, make_test_mesh(1, 1), 0),
        lambda: train_step.make_loss_fn(short, seq_len=SEQ_LEN, num_valid=NUM_VALID, num_chunks=1),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    with pytest.raises(AssertionError, match="16 tokens, 8 positions"):
        graph, params = graph_of(short, 8), init_params(short, 8, jax.random.key(0))
        nnx.merge(graph, params)(jnp.asarray(WINDOW)[None])
    with pytest.raises(ValueError, match=r"model\.block_size: found 0"):
        GPTConfig(block_size=0)


def test_flops_do_not_count_the_position_table_however_long():
    short, long = GPTConfig(), GPTConfig(block_size=4096)
    num_params = 10**8
    extra = (4096 - 1024) * short.n_embd
    assert metrics.flops_per_token(short, num_params, 1024) == metrics.flops_per_token(long, num_params + extra, 1024)


def test_a_checkpoint_with_a_longer_table_is_sampled_within_the_length_it_was_trained_on(config, tmp_path):
    config = dataclasses.replace(config, block_size=64, n_layer=1)
    params = sharp_params(config, SEQ_LEN)
    manager = Checkpoints(tmp_path)
    state = train_state.TrainState(jnp.int32(1), params, ())
    manager.save(1, state, {"step": 1, "model": dataclasses.asdict(config), "seq_len": SEQ_LEN})
    manager.close()
    restored, found, metadata = generate.load(str(tmp_path), "cpu")
    assert restored["position_embedding"]["embedding"].shape[0] == 64
    new = generate.sample(restored, found, WINDOW[:4], seq_len=SEQ_LEN, num_valid=NUM_VALID, num_tokens=99)
    assert len(new) == SEQ_LEN - 4 + 1
