import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.compiled import FUNCTIONS, communicated_shapes, lower, lowered_texts
from support.models import END_OF_TEXT, VOCAB_SIZE, make_spec, make_test_mesh
from support.runs import build_anew, make_metadata, run_config

from gpt_pretrain.model import attention
from gpt_pretrain.model.document_mask import documents_of
from gpt_pretrain.model.gpt import GPT, init_params, model_of
from gpt_pretrain.model.intervening import doses_at
from gpt_pretrain.model.interventions import Intervention
from gpt_pretrain.model.sampling import sample
from gpt_pretrain.model.spec import GPTConfig
from gpt_pretrain.optim.adamw import adamw
from gpt_pretrain.optim.optimizer import Optimizer
from gpt_pretrain.parallel.partition import batch_sharding
from gpt_pretrain.train import step as step_lib
from gpt_pretrain.train.checkpoints import Checkpoints
from gpt_pretrain.train.pretrained import load
from gpt_pretrain.train.report import say_what_runs
from gpt_pretrain.train.state import TrainState, fresh_state, shardings_of
from gpt_pretrain.train.step import StepOptions

SEQ_LEN, END = 16, END_OF_TEXT
# Begins inside a document; two end-of-texts in a row; one at the last position.
LENGTHS = (4, 5, 1, 5, 1)
WINDOW = np.array([7, 8, 9, 10, END, 11, 12, 13, 14, END, END, 15, 16, 17, 18, END])
HALVED = Intervention("zero", strength=0.5, sites=["attn_out"])
BOUNDS = list(zip(np.cumsum((0, *LENGTHS[:-1])).tolist(), np.cumsum(LENGTHS).tolist(), strict=True))


@pytest.fixture(scope="module")
def spec():
    return make_spec(SEQ_LEN, n_embd=16)


@pytest.fixture(scope="module")
def params(spec):
    return sharp_params(spec)


def masked(spec):
    return dataclasses.replace(spec, document_mask=True)


def sharp_params(spec):
    """Far from uniform attention and with strong positions, so that mistakes show."""
    return jax.tree.map(lambda leaf: leaf * 8, init_params(spec, jax.random.key(0)))


def logits_fn(spec, params, *, masked, rng=None):
    @jax.jit
    def logits(tokens_BT):
        model = model_of(spec)(params)
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


def test_a_document_has_the_logits_it_has_alone(spec, params):
    packed = logits_fn(spec, params, masked=True)(WINDOW)
    plain = logits_fn(spec, params, masked=False)
    for start, stop in BOUNDS:
        alone = plain(np.pad(WINDOW[start:stop], (0, SEQ_LEN - (stop - start))))  # causal: padding does not matter
        assert_close(packed[start:stop], alone[: stop - start], atol=1e-4)
    together = plain(WINDOW)
    assert_close(packed[:4], together[:4], atol=1e-4)
    assert not np.allclose(packed[4:], together[4:], atol=1e-2)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.1}, {"dtype": "bfloat16"}])
def test_no_token_of_a_document_reaches_another(spec, params, changes):
    """With dropout: its path writes attention out, under the same masks of dropout."""
    spec = dataclasses.replace(spec, **changes)
    logits = logits_fn(spec, params, masked=True, rng=jax.random.key(1) if spec.dropout else None)
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


def test_dropout_of_rate_zero_attends_as_without():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, SEQ_LEN, 2, 8))
    segment_ids = documents_of(jnp.stack([WINDOW, WINDOW[::-1]]), END).segment_ids_BT
    found = attention.causal_attention_with_dropout(0.0, jax.random.key(0), segment_ids)(0, q, k, v)
    assert_close(found, attention.causal_attention("xla", segment_ids)(0, q, k, v), atol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_documents_one_by_one_with_hooks_and_remat_too(spec, params):
    spec, doses = dataclasses.replace(spec, interventions=(HALVED,)), doses_at(1, [HALVED])
    window = np.append(WINDOW, 19).astype(np.uint16)
    plain = step_lib.make_gradients(StepOptions(spec))

    @jax.jit
    def one_by_one(p):
        sums = []
        for length in set(LENGTHS):  # mean of the documents of this length, times their share of the tokens
            rows = np.stack([window[start : stop + 1] for start, stop in BOUNDS if stop - start == length])
            found = plain(p, rows[None], None, *doses)
            share = len(rows) * length / SEQ_LEN
            sums.append(jax.tree.map(lambda leaf, share=share: share * leaf, found))
        return jax.tree.map(lambda *leaves: sum(leaves), *sums)

    expected = one_by_one(params)
    for remat in ("none", "full"):
        gradients = step_lib.make_gradients(StepOptions(dataclasses.replace(masked(spec), remat=remat)))
        found = jax.jit(lambda p, gradients=gradients: gradients(p, window[None, None], None, *doses))(params)
        assert_close(found, expected, rtol=1e-3, atol=1e-5)


# A window of two documents of 8 tokens each is, with the mask, two windows of 8 without: in every number.
# The model has SEQ_LEN positions for both.


@pytest.fixture(scope="module")
def two_documents():
    """(num_microbatches, rows, 17) packed; (num_microbatches, 2 * rows, 9) the same documents apart."""
    packed = random_documents((2, 4, SEQ_LEN + 1), 8)
    return packed, np.concatenate([packed[..., :9], packed[..., 8:]], axis=1)


def make_step(spec, mesh, num_chunks):
    optimizer = adamw(100, lr=1e-2, warmup_steps=2)
    state = fresh_state(spec, optimizer.transform, mesh, seed=0)
    options = StepOptions(spec, num_chunks=num_chunks, mesh=mesh)
    step = step_lib.make_train_step(options, optimizer)
    return state, step_lib.compile_train_step(step, shardings_of(state), mesh)


def losses_of(spec, mesh, batch, *, num_chunks, num_steps=4):
    state, step = make_step(spec, mesh, num_chunks)
    rows = []
    for _ in range(num_steps):
        state, found = step(state, jax.device_put(batch, batch_sharding(mesh)))
        rows.append([float(found[name]) for name in ("loss", "grad_norm", "param_norm", "update_norm")])
    return np.array(rows)


@pytest.mark.slow
def test_packed_documents_on_four_devices_train_like_the_same_documents_apart_on_one(spec, two_documents):
    spec = dataclasses.replace(spec, n_layer=1)
    packed, apart = two_documents
    one_device = losses_of(spec, make_test_mesh(1, 1), apart, num_chunks=1)
    four_devices = losses_of(masked(spec), make_test_mesh(2, 2), packed, num_chunks=2)
    assert one_device[-1, 0] < one_device[0, 0]
    np.testing.assert_allclose(four_devices, one_device, rtol=2e-5)


def test_validation_loss_uses_the_mask(spec, params, two_documents):
    packed, apart = (batch[:1] for batch in two_documents)

    def evaluate(spec, batch, weights):
        eval_step = jax.jit(step_lib.make_eval_step(StepOptions(spec)))
        return eval_step(params, batch, np.array([weights], np.float32), 0)

    found = evaluate(masked(spec), packed, [1, 1, 0, 1])
    assert_close(found, evaluate(spec, apart, [1, 1, 0, 1] * 2))
    assert abs(found[0] / evaluate(spec, packed, [1, 1, 0, 1])[0] - 1) > 1e-2


def test_statistics_are_those_of_the_masked_step(spec, params, two_documents):
    spec = dataclasses.replace(spec, remat="full", n_layer=1)
    params = params | {"layers": {0: params["layers"][0]}}
    packed, apart = (batch[:1] for batch in two_documents)
    state = TrainState(jnp.int32(0), params, ())
    optimizer = Optimizer(optax.identity(), lambda step: step)
    found = jax.jit(step_lib.make_statistics(StepOptions(masked(spec)), optimizer))(state, packed)
    expected = jax.jit(step_lib.make_statistics(StepOptions(spec), optimizer))(state, apart)
    assert found.keys() == expected.keys() and len(found) > 12
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_fsdp_with_the_mask_still_moves_no_activations():
    spec = make_spec(128, n_layer=1, n_embd=256, document_mask=True)  # activations are larger than weights
    spec = dataclasses.replace(spec, padded_vocab_size=2048)
    lowered = lower("train", spec, make_test_mesh(1, 4), batch=(2, 8))
    shapes = communicated_shapes(lowered)
    weights = {leaf.shape for leaf in jax.tree.leaves(lowered.in_avals[0][0].params)}
    assert weights & shapes and not [shape for shape in shapes if len(shape) > 2], shapes - weights


def model_that_knows_no_documents(self, tokens_BT, *, documents, hook, around=None, rng=None):
    rate = self.spec.dropout
    rng_embed = rng_layers = None
    if rng is not None and rate:
        rng_embed, rng_attend, rng_layers = jax.random.split(rng, 3)
    positions_T = 0 + jnp.arange(tokens_BT.shape[1])
    x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
    x_BTD = hook("embeddings", None, attention.dropout(x_BTD.astype(self.spec.dtype), rate, rng_embed))

    def attend(layer, q_BTHK, k_BTHK, v_BTHK):
        if rng is None or not rate:
            q, k, v = (x.swapaxes(1, 2)[:, :, 0:SEQ_LEN] for x in (q_BTHK, k_BTHK, v_BTHK))
            scores = jnp.einsum("bhtk,bhsk->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            is_past = jnp.arange(SEQ_LEN) <= jnp.arange(0, SEQ_LEN)[:, None]
            probs = jax.nn.softmax(jnp.where(is_past, scores, -jnp.inf), axis=-1)
            return jnp.concatenate([jnp.einsum("bhts,bhsk->bhtk", probs.astype(v.dtype), v)], axis=2).swapaxes(1, 2)
        scores_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK, preferred_element_type=jnp.float32)
        scores_BHTS = scores_BHTS / jnp.sqrt(q_BTHK.shape[-1])
        is_past = jnp.tril(jnp.ones((SEQ_LEN, SEQ_LEN), bool))
        probs_BHTS = jax.nn.softmax(jnp.where(is_past, scores_BHTS, -jnp.inf), axis=-1)
        probs_BHTS = attention.dropout(probs_BHTS, rate, jax.random.fold_in(rng_attend, layer))
        return jnp.einsum("bhts,bshk->bthk", probs_BHTS.astype(v_BTHK.dtype), v_BTHK)

    attend = around(attend, None) if around else attend
    for index, layer in enumerate(self.layers):
        x_BTD = layer(x_BTD, index, attend=attend, hook=hook, rng=rng_layers)
    return hook("final_norm", None, self.ln_f(x_BTD))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_mask_that_is_off_leaves_no_trace_in_the_lowered_functions(spec, monkeypatch, dropout):
    mesh, spec = make_test_mesh(1, 1), dataclasses.replace(spec, n_layer=1, dropout=dropout)
    off, on = lowered_texts(spec, mesh), lowered_texts(masked(spec), mesh)
    monkeypatch.setattr(GPT, "__call__", model_that_knows_no_documents)
    without = lowered_texts(spec, mesh)
    for function in FUNCTIONS:
        assert off[function] == without[function]
        assert on[function] != off[function] and "cummax" in on[function] and "cummax" not in off[function]


def test_cudnn_cannot_have_the_mask_and_auto_chooses_a_kernel_that_can():
    assert make_spec(platform="gpu").attention == "cudnn"
    assert make_spec(128, platform="gpu", document_mask=True).attention == "triton"
    assert make_spec(127, platform="gpu", document_mask=True).attention == "xla"
    assert make_spec(128, platform="tpu", document_mask=True).attention == "splash"
    assert make_spec(platform="cpu", document_mask=True).attention == "xla"
    with pytest.raises(ValueError, match=r"model.attention='cudnn' cannot run: found a document mask.*'xla'"):
        make_spec(platform="gpu", attention="cudnn", document_mask=True)
    with pytest.raises(AssertionError, match="refuses cudnn"):  # a caller that forgot to say so is not obeyed silently
        attention.causal_attention("cudnn", jnp.zeros((1, 4), jnp.int32))


def test_the_run_says_whether_attention_stays_within_documents(tiny_dataset, caplog):
    for block_size, mask, words in ((None, False, "attention by xla"), (32, True, "attention by xla within documents")):
        config = run_config(tiny_dataset, model={"block_size": block_size}, data={"document_mask": mask})
        caplog.clear()
        with caplog.at_level(logging.INFO):
            say_what_runs(*build_anew(config))
        line = next(message for message in caplog.messages if message.startswith("Model"))
        assert line.endswith(words) and f"{block_size or 8} positions" in line


def test_sampling_sees_the_last_document_of_the_prompt_and_ends_with_it(spec, params):
    prompt = WINDOW[:7]  # the end of one document, the beginning of another
    how = {"seq_len": SEQ_LEN, "temperature": 0.0}
    new = sample(params, masked(spec), prompt, num_tokens=6, **how)
    logits = logits_fn(spec, params, masked=True)
    tokens = prompt.tolist()
    while len(tokens) < 13:
        padded = np.pad(tokens, (0, SEQ_LEN - len(tokens)))
        tokens.append(int(logits(padded)[len(tokens) - 1, :VOCAB_SIZE].argmax()))
    assert END not in tokens[7:] and new.tolist() == tokens[7:]
    assert new.tolist() != sample(params, spec, prompt, num_tokens=6, **how).tolist()

    table = params["token_embedding"]["embedding"]
    ending = params | {"ln_f": {"scale": 0 * table[END], "bias": table[END] / abs(table[END]).max()}}
    ending["token_embedding"] = {"embedding": table.at[END].mul(9)}  # end-of-text is always the likeliest
    assert sample(ending, spec, prompt, num_tokens=6, **how).tolist() == [END] * 6
    assert sample(ending, masked(spec), prompt, num_tokens=6, **how).tolist() == []


# --- block_size ---


def test_the_position_table_has_block_size_rows_and_shorter_sequences_use_its_front(spec):
    longer = make_spec(SEQ_LEN, n_embd=16, block_size=64)
    params = sharp_params(longer)
    table = params["position_embedding"]["embedding"]
    assert table.shape[0] == 64 == longer.num_positions and spec.num_positions == SEQ_LEN
    front = params | {"position_embedding": {"embedding": table[:SEQ_LEN]}}
    found, expected = (logits_fn(s, p, masked=False)(WINDOW) for s, p in ((longer, params), (spec, front)))
    assert np.array_equal(found, expected)


def test_shorter_sequences_train_the_front_of_the_table_and_longer_ones_go_on_from_it():
    spec = make_spec(SEQ_LEN, n_embd=16, block_size=2 * SEQ_LEN, n_layer=1)
    params = init_params(spec, jax.random.key(0))
    long = jax.random.randint(jax.random.key(0), (4, 2 * SEQ_LEN + 1), 0, VOCAB_SIZE).astype(jnp.uint16)
    grad = jax.jit(jax.grad(step_lib.make_loss_fn(StepOptions(spec)), has_aux=True))
    trained = {}
    for seq_len in (SEQ_LEN, 2 * SEQ_LEN):
        grads, _ = grad(params, long[:, : seq_len + 1], None)
        trained[seq_len] = np.asarray(grads["position_embedding"]["embedding"]).any(-1).tolist()
    assert trained == {SEQ_LEN: [True] * SEQ_LEN + [False] * SEQ_LEN, 2 * SEQ_LEN: [True] * 2 * SEQ_LEN}


def test_sequences_longer_than_block_size_are_refused(tiny_dataset):
    message = r"data\.seq_len=16 is longer than model\.block_size=8"
    for attempt in (
        lambda: GPTConfig(block_size=8).num_positions(SEQ_LEN),
        lambda: make_spec(SEQ_LEN, block_size=8),
        lambda: run_config(tiny_dataset, model={"block_size": 8}, data={"seq_len": SEQ_LEN}),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    with pytest.raises(AssertionError, match="16 tokens, 8 positions"):
        short = make_spec(8)
        model_of(short)(init_params(short, jax.random.key(0)))(jnp.asarray(WINDOW)[None])
    with pytest.raises(ValueError, match=r"model\.block_size: found 0"):
        GPTConfig(block_size=0)


def test_a_checkpoint_with_a_longer_table_is_sampled_within_the_length_it_was_trained_on(tmp_path):
    spec = make_spec(SEQ_LEN, n_embd=16, block_size=64, n_layer=1)
    manager = Checkpoints(tmp_path)
    state = TrainState(jnp.int32(1), sharp_params(spec), ())
    manager.save(state, make_metadata(1, spec=spec, seq_len=SEQ_LEN))
    manager.close()
    restored, metadata = load(str(tmp_path), "cpu")
    assert restored["position_embedding"]["embedding"].shape[0] == 64
    new = sample(restored, metadata.model, WINDOW[:4], seq_len=metadata.seq_len, num_tokens=99)
    assert len(new) == SEQ_LEN - 4 + 1
