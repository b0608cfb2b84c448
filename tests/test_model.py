"""The model against a plain one and against transformers; what it draws, counts, refuses and generates."""
import math
from types import SimpleNamespace

import pytest
import torch

from model import GPT, GPTConfig, LayerCache, peak_flops, pick, row_seeds
from plain_gpt import PlainGPT

SHAPE = dict(block_size=16, vocab_size=23, n_layer=2, n_head=4, n_embd=32)
both_biases = pytest.mark.parametrize('bias', [True, False], ids=['bias', 'no_bias'])


def small(bias=True, seed=1, **other):
    """A small model in evaluation mode whose every tensor matters: biases and LayerNorms are random too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SHAPE, 'bias': bias, **other})).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def ids(B=3, T=16, seed=2):
    return torch.randint(SHAPE['vocab_size'], (B, T), generator=torch.Generator().manual_seed(seed))


def assert_near(got, want, allowed):
    error = (got - want).abs().max()
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.0e}" # a NaN fails too


# -----------------------------------------------------------------------------
# the same weights give the same figures

@both_biases
def test_same_weights_give_the_logits_and_loss_of_the_plain_model(bias):
    model, x, y = small(bias), ids(), ids(seed=3)
    plain = PlainGPT(**SHAPE, bias=bias)
    plain.load_state_dict(model.state_dict())
    (logits, loss), (plain_logits, plain_loss) = model(x, y), plain(x, y)
    assert_near(logits, plain_logits, 1e-5)
    assert_near(loss, plain_loss, 1e-5)
    assert_near(model(x)[0], plain_logits[:, [-1]], 1e-5)


@both_biases
def test_same_weights_give_the_gradients_of_the_plain_model(bias):
    model, x, y = small(bias), ids(), ids(seed=3)
    plain = PlainGPT(**SHAPE, bias=bias)
    plain.load_state_dict(model.state_dict())
    model(x, y)[1].backward()
    plain(x, y)[1].backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        assert p.grad.norm() > 0, name
        assert_near(p.grad, q.grad, 1e-5)


def test_the_loss_in_training_mode_is_the_same_without_dropout():
    model, x, y = small(), ids(), ids(seed=3)
    assert_near(model.train()(x, y)[1], model.eval()(x, y)[1], 0)


def test_dropout_acts_in_training_only():
    model, x = small(dropout=0.5), ids()
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_no_place_sees_a_later_one():
    model, x, y = small(), ids(), ids(seed=3)
    later = x.clone()
    later[:, 9:] = 0
    assert torch.equal(model(x, y)[0][:, :9], model(later, y)[0][:, :9])


def test_targets_of_minus_one_do_not_count():
    model, x, y = small(), ids(), ids(seed=3)
    masked = y.clone()
    masked[:, :10] = -1
    logits, loss = model(x, masked)
    log_p = torch.log_softmax(logits[:, 10:], dim=-1)
    assert_near(loss, -log_p.gather(-1, y[:, 10:, None]).mean(), 1e-5)


# -----------------------------------------------------------------------------
# transformers

@pytest.fixture(scope='module')
def hf_folder(tmp_path_factory):
    """A random GPT-2 as transformers saves it, biases and LayerNorms random too."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(5)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=23, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=0,
                                    eos_token_id=0)).eval()
    for p in hf.parameters():
        p.data += 0.1 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp('hf')
    hf.save_pretrained(folder)
    return folder, hf


def test_pretrained_weights_give_the_logits_and_loss_of_transformers(hf_folder):
    folder, hf = hf_folder
    model, x = GPT.from_pretrained(str(folder)).eval(), ids()
    targets = torch.cat([x[:, 1:], torch.full((3, 1), -1)], dim=1)
    logits, loss = model(x, targets)
    assert model.config.gelu == 'tanh' and model.config.bias
    assert_near(logits, hf(x).logits, 1e-4)
    assert_near(loss, hf(x, labels=x).loss, 1e-4)


def test_pretrained_weights_stay_tied_trainable_and_take_a_dropout(hf_folder):
    model = GPT.from_pretrained(str(hf_folder[0]), dict(dropout=0.25))
    assert model.transformer.wte.weight is model.lm_head.weight
    assert model.transformer.h[0].mlp.dropout.p == model.transformer.drop.p == model.config.dropout == 0.25
    assert all(p.requires_grad for p in model.parameters())


def test_the_two_gelus_differ_and_the_exact_one_is_the_default():
    x = torch.linspace(-4, 4, 99)
    exact = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    tanh = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    assert GPTConfig().gelu == 'none'
    assert_near(small().transformer.h[0].mlp.gelu(x), exact, 1e-6)
    assert_near(small(gelu='tanh').transformer.h[0].mlp.gelu(x), tanh, 1e-6)
    assert (exact - tanh).abs().max() > 1e-4


def test_a_model_that_is_nowhere_is_refused_in_one_line(monkeypatch, tmp_path):
    for name in ('no/such-model', str(tmp_path)):
        with pytest.raises(OSError, match='cannot load') as refused:
            GPT.from_pretrained(name)
        assert '\n' not in str(refused.value)


# -----------------------------------------------------------------------------
# names, numbers, initialisation

NAMES_OF_A_BLOCK = ['ln_1.weight', 'ln_1.bias', 'attn.c_attn.weight', 'attn.c_attn.bias', 'attn.c_proj.weight',
                    'attn.c_proj.bias', 'ln_2.weight', 'ln_2.bias', 'mlp.c_fc.weight', 'mlp.c_fc.bias',
                    'mlp.c_proj.weight', 'mlp.c_proj.bias']


@both_biases
def test_parameters_have_nanogpts_names_in_nanogpts_order(bias):
    names = ['transformer.wte.weight', 'transformer.wpe.weight',
             *[f'transformer.h.{i}.{name}' for i in range(2) for name in NAMES_OF_A_BLOCK],
             'transformer.ln_f.weight', 'transformer.ln_f.bias', 'lm_head.weight']
    assert list(small(bias).state_dict()) == [name for name in names if bias or not name.endswith('bias')]


@both_biases
def test_initial_weights_are_the_ones_that_nanogpt_draws(bias):
    torch.manual_seed(7)
    plain = PlainGPT(**SHAPE, bias=bias)
    drawn_next = torch.rand(1)
    torch.manual_seed(7)
    model = GPT(GPTConfig(**SHAPE, bias=bias))
    assert torch.rand(1) == drawn_next # not one number more or less
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(p, q), name


def test_initial_weights_have_gpt2s_spread():
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith('c_proj.weight') else 0.02
            assert abs(p.std() / std - 1) < 0.03 and abs(p.mean()) < std / 20, name


def test_the_head_is_the_token_embedding():
    model = small()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p.numel() for p in model.parameters()) == sum(
        t.numel() for name, t in model.state_dict().items() if name != 'lm_head.weight')


def test_gpt2_has_124_million_parameters():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    block = 4 * 768 + (768 + 1) * 3 * 768 + (768 + 1) * 768 + (768 + 1) * 3072 + (3072 + 1) * 768
    assert model.get_num_params() == 50257 * 768 + 12 * block + 2 * 768 == 123_653_376
    assert model.get_num_params(non_embedding=False) == 123_653_376 + 1024 * 768 == 124_439_808


# -----------------------------------------------------------------------------
# optimiser, cropping, checkpoints

def test_the_optimiser_decays_matrices_and_nothing_else():
    model = small()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    decayed, plain = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (decayed['weight_decay'], plain['weight_decay']) == (0.1, 0.0)
    parameters = list(model.parameters())
    for group, wanted in ((decayed, [p for p in parameters if p.dim() == 2]),
                          (plain, [p for p in parameters if p.dim() == 1])):
        assert (group['lr'], group['betas']) == (1e-3, (0.9, 0.95))
        assert [id(p) for p in group['params']] == [id(p) for p in wanted] # in nanoGPT's order, none twice


def test_a_cropped_model_gives_the_same_logits_for_short_texts():
    model, x = small(), ids(T=8)
    before = model(x)[0]
    model.crop_block_size(8)
    assert model.config.block_size == 8 and model.transformer.wpe.weight.shape == (8, 32)
    assert torch.equal(model(x)[0], before)
    with pytest.raises(ValueError, match='at most block_size=8 tokens at once, got 9'):
        model(ids(T=9))


def test_cropping_to_more_than_there_is_is_refused():
    for size in (17, 0):
        with pytest.raises(ValueError, match=f"block_size must be 1 to 16, the model's own, got {size}"):
            small().crop_block_size(size)


def test_a_checkpoint_of_a_compiled_nanogpt_becomes_the_model():
    model, x = small(), ids()
    weights = {f'_orig_mod.{name}': t.clone() for name, t in model.state_dict().items()}
    found = GPT.from_checkpoint({'model': weights, 'model_args': {**SHAPE, 'bias': True, 'dropout': 0.0}}).eval()
    assert torch.equal(found(x)[0], model(x)[0])
    assert found.config.gelu == 'none' and found.lm_head.weight is found.transformer.wte.weight


def test_what_is_no_checkpoint_is_refused_in_words():
    model = small()
    good = {'model': model.state_dict(), 'model_args': model.config.model_args()}

    def with_weights(**changes):
        return {**good, 'model': {**good['model'], **changes}}
    for checkpoint, words in [
            ([], "it has no 'model'"), ({'model': {}}, "it has no 'model_args'"),
            ({**good, 'model_args': {**good['model_args'], 'n_layers': 2}}, "unknown 'n_layers'"),
            ({**good, 'model_args': {**good['model_args'], 'n_layer': 3}}, r"the weights lack transformer\.h\.2\."),
            (with_weights(extra=torch.zeros(1)), "the model has no extra"),
            (with_weights(**{'lm_head.weight': torch.zeros(9, 32)}), r"weight must be \(23, 32\), got \(9, 32\)"),
    ]:
        with pytest.raises(ValueError, match=words):
            GPT.from_checkpoint(checkpoint)


@pytest.mark.parametrize('setting, words', [
    (dict(n_embd=30), 'n_embd must be a multiple of n_head, got n_embd=30 and n_head=4'),
    (dict(n_layer=0), 'n_layer must be at least 1, got 0'), (dict(n_head=0), 'n_head must be at least 1, got 0'),
    (dict(dropout=1.0), 'dropout must be at least 0 and below 1, got 1.0'),
    (dict(gelu='relu'), "gelu must be 'none' or 'tanh', got 'relu'"),
])
def test_a_model_that_cannot_be_is_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**SHAPE, **setting})


def test_model_args_are_nanogpts_seven_and_no_other():
    args = GPTConfig(TK_kernel=False, gelu='tanh').model_args()
    assert list(args) == ['block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias']
    assert args == dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=True)


def test_the_kernel_enters_by_one_switch(monkeypatch):
    called = []
    monkeypatch.setattr('model.causal_attention_qkv', lambda qkv, n_head, dropout: called.append(
        (qkv.shape, n_head, dropout)) or torch.zeros(3, 16, 32))
    small(TK_kernel=True, dropout=0.5).train()(ids())
    small(TK_kernel=True, dropout=0.5).eval()(ids())
    assert called == [((3, 16, 96), 4, 0.5)] * 2 + [((3, 16, 96), 4, 0.0)] * 2
    small(TK_kernel=False)(ids())
    assert len(called) == 4


# -----------------------------------------------------------------------------
# what a step costs

def test_flops_of_a_token_follow_the_palm_paper():
    model = small()
    attention = 12 * 2 * 32 * 16 # 12 L H Q T
    assert model.flops_per_token() == 6 * model.get_num_params() + attention
    assert model.flops_per_token(causal=True) == 6 * model.get_num_params() + attention / 2


@pytest.mark.parametrize('name, tflops', [
    ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA A100 80GB PCIe', 312), ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756), ('NVIDIA H100 NVL', 835), ('NVIDIA H200', 989), ('NVIDIA GH200 480GB', 989),
    ('NVIDIA RTX A1000', None), ('NVIDIA H20', None), ('NVIDIA H800', None), ('NVIDIA GeForce RTX 4090', None),
    ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None), ('x86_64', None),
])
def test_the_peak_is_that_of_the_card_or_none(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_mfu_is_none_where_the_peak_is_not_known():
    assert small().estimate_mfu(8, 0.1) is None


def test_mfu_is_nanogpts_on_a_known_card(monkeypatch):
    class OnCuda(torch.nn.Module):
        weight = SimpleNamespace(device=torch.device('cuda'))
    model = small()
    model.lm_head = OnCuda()
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA A100-SXM4-40GB')
    n = model.get_num_params()
    assert model.estimate_mfu(8, 0.1) == pytest.approx((6 * n + 12 * 2 * 4 * 8 * 16) * 16 * 8 / 0.1 / 312e12)


# -----------------------------------------------------------------------------
# generate

def test_temperature_zero_takes_the_likeliest_token_each_time():
    model, x = small(), ids(B=8, T=20) # more than block_size: the model sees the last 16
    out = model.generate(x, 8, temperature=0)
    assert out.shape == (8, 28) and torch.equal(out[:, :20], x)
    for end in range(20, 28):
        assert torch.equal(out[:, end], model(out[:, end - 16:end])[0][:, -1].argmax(-1))


def test_top_k_draws_among_the_likeliest_only():
    logits, seeds = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(400, 4), row_seeds(1, 400, 'cpu')
    assert set(pick(logits, seeds, 0, top_k=2).tolist()) == {1, 3}
    assert set(pick(logits, seeds, 0, top_k=1).tolist()) == {1}
    assert set(pick(logits, seeds, 0, top_k=99).tolist()) == {0, 1, 2, 3}


def test_top_p_draws_among_the_likeliest_that_have_this_probability_together():
    logits, seeds = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log().expand(400, 4), row_seeds(1, 400, 'cpu')
    for top_p, allowed in ((0.01, {1}), (0.5, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (1.0, {0, 1, 2, 3})):
        assert set(pick(logits, seeds, 0, top_p=top_p).tolist()) == allowed


def test_tokens_are_drawn_as_likely_as_the_model_says():
    logits, n = torch.tensor([[0.0, 1.0, 2.0]]), 20000
    over_samples = lambda temperature: pick(logits.expand(n, 3), row_seeds(1, n, 'cpu'), 7, temperature) # noqa: E731
    over_places = lambda temperature: pick(logits.expand(n, 3), torch.zeros(n, dtype=torch.long), # noqa: E731
                                           torch.arange(n), temperature)
    for temperature in (1.0, 0.5):
        for draw in (over_samples, over_places):
            wanted = torch.softmax(logits[0] / temperature, dim=0)
            assert_near(torch.bincount(draw(temperature), minlength=3) / n, wanted, 0.02)


def test_neighbouring_tokens_places_and_samples_draw_independently():
    even = torch.zeros(4000, 2)
    noise = [pick(even, row_seeds(seed, 4000, 'cpu'), place).float() for seed in (1, 2) for place in (5, 6)]
    together = torch.stack([*noise, noise[0].roll(1)])
    assert (torch.corrcoef(together) - torch.eye(5)).abs().max() < 0.06 # 4 standard deviations


def test_ids_that_no_token_has_are_never_drawn():
    model = small()
    model.lm_head.weight.data[20:] *= 50 # the likeliest by far
    x = torch.zeros(8, 1, dtype=torch.long)
    assert model.generate(x, 30).max() >= 20
    for temperature in (0, 1.0, 5.0):
        assert model.generate(x, 30, temperature=temperature, top_k=10, n_tokens=20).max() < 20


def test_one_seed_gives_one_text():
    model, texts = small(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(ids(B=1, T=2), 20))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


CHOICES = [dict(temperature=0), dict(), dict(temperature=0.8, top_k=5), dict(top_p=0.7, n_tokens=30)]


@pytest.mark.parametrize('choice', CHOICES, ids=str)
def test_kept_keys_and_values_give_the_text_of_the_plain_loop_across_the_block_boundary(choice):
    model = small()
    for T in (1, 7, 15, 16, 17, 30):
        x = ids(B=3, T=T)
        plain = model.generate_plain(x, 20, seed=3, **choice)
        assert torch.equal(model.generate(x, 20, seed=3, **choice), plain)


def test_a_sample_does_not_depend_on_what_grows_beside_it():
    model = small()
    prompts = [ids(B=1, T=T)[0] for T in (3, 9, 1, 16, 20)] # of unequal length, two past the block
    rows = torch.stack(list(model.stream(prompts, 12, seed=4)), dim=1)
    seeds = row_seeds(4, len(prompts), 'cpu')
    for i, prompt in enumerate(prompts):
        text = prompt[None]
        for _ in range(12): # alone, by the definition
            text = torch.cat((text, pick(model(text[:, -16:])[0][:, -1], seeds[[i]], text.size(1))[:, None]), dim=1)
        assert torch.equal(text[0, len(prompt):], rows[i])
    first = list(model.stream(prompts[:1], 12, seed=4))
    assert torch.equal(torch.cat(first), rows[0])


def test_a_new_token_costs_one_place_not_the_whole_text(monkeypatch):
    model, sizes = small(), []
    features = model.features
    monkeypatch.setattr(model, 'features', lambda idx, *rest: sizes.append(idx.shape) or features(idx, *rest))
    model.generate(ids(B=2, T=5), 14) # 16 fit
    assert sizes == [(2, 5)] + [(2, 1)] * 11 + [(2, 16)] * 2


def test_kept_keys_in_bfloat16_are_as_near_to_float32_as_the_whole_forward_is():
    model, x = small(), ids(B=4, T=16)
    with torch.no_grad():
        exact = model.lm_head(model.features(x, torch.arange(16)))
        with torch.autocast('cpu', dtype=torch.bfloat16):
            whole = model.lm_head(model.features(x, torch.arange(16)))
            lengths = torch.full((4,), 8)
            caches = [LayerCache(16, lengths) for _ in range(model.config.n_layer)]
            model.features(x[:, :8], torch.arange(8), caches)
            kept = []
            for t in range(8, 16):
                kept.append(model.lm_head(model.features(x[:, [t]], lengths[:, None], caches)))
                lengths += 1
    off = (torch.cat(kept, 1) - exact[:, 8:]).norm()
    assert off <= 1.5 * (whole[:, 8:] - exact[:, 8:]).norm()


@pytest.mark.gpu
@pytest.mark.parametrize('choice', CHOICES, ids=str)
def test_on_a_gpu_too_kept_keys_and_values_give_the_text_of_the_plain_loop(choice):
    tf32 = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    model = small().to('cuda')
    for T in (1, 7, 15, 16, 17, 30):
        x = ids(B=3, T=T).to('cuda')
        plain = model.generate_plain(x, 20, seed=3, **choice)
        assert torch.equal(model.generate(x, 20, seed=3, **choice), plain)
    torch.set_float32_matmul_precision(tf32)
