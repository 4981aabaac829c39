"""What is known of other people's code: wrappers, signatures, caches, positions."""

from __future__ import annotations

import functools
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch
from models import MASK, PAD, VOCABULARY, DreamLike, Remote, Words, tiny_model
from torch import nn

from nap_decode import AnyOrderScheduler, CommittedReuse, Decoder, Denoiser, ModelFamily, NapDecodeError, Sampler
from nap_decode.model import foreign
from nap_decode.run.generate import check_same_model


class Passes(nn.Module):
    """Passes on what it is called with, as most wrappers do."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Named(Passes):
    """Names arguments of its own, and shares config and output layer, as PEFT's wrappers with a task do."""

    def __init__(self, module):
        super().__init__(module)
        self.config = module.config

    def get_output_embeddings(self):
        return self.module.get_output_embeddings()

    def get_input_embeddings(self):
        return self.module.get_input_embeddings()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return self.module(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Keywords(Passes):
    """Names the ids, and passes everything else on."""

    def __init__(self, module):
        super().__init__(module)
        self.config = module.config

    def forward(self, input_ids, **kwargs):
        return self.module(input_ids=input_ids, **kwargs)


def takes_embeddings(module):
    return "inputs_embeds" in inspect.signature(module.forward).parameters


class Loaded(nn.Module):
    """Exchanges the forward of what it is given, as accelerate does."""

    def __new__(cls, module):
        original = module.forward

        def forward(*args, **kwargs):
            return original(*args, **kwargs)

        forward.__wrapped__ = original
        module.forward = forward
        return module


def lora(task):
    def wrap(module):
        peft = pytest.importorskip("peft")
        targets = ["q_proj"] if any("q_proj" in name for name, _ in module.named_modules()) else ["layers.0"]
        return peft.get_peft_model(module, peft.LoraConfig(target_modules=targets, task_type=task)).eval()

    return wrap


@pytest.fixture(scope="module")
def _one_process(tmp_path_factory):
    """A group of one process, which distributed wrappers ask for."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "torch.compile": lambda module: torch.compile(module, backend="eager"),
    "DataParallel": nn.DataParallel,
    "passes on": Passes,
    "twice": lambda module: Passes(nn.DataParallel(module)),
    "named": Named,
    "named, passed on": lambda module: Passes(Named(module)),
    "exchanged forward": Loaded,
    "a partial": lambda module: functools.partial(module, inputs_embeds=None) if takes_embeddings(module) else module,
    "its forward": lambda module: module.forward,
    "its class's keywords": lambda module: Keywords(module),
    "PEFT": lora(None),
    "PEFT, with a task": lora("CAUSAL_LM"),
}


class Generating(DreamLike):
    """What PEFT asks of a model with a task."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **options):
        return super().forward(input_ids, attention_mask, position_ids)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        raise NotImplementedError


MODELS = {
    "in place": lambda: tiny_model(),
    "shifted by config": lambda: tiny_model(right_shift_logits=True),
    "shifted by family": lambda: Generating("Dream", mask_token_id=MASK),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request):
    if request.param == "DDP":
        request.getfixturevalue("_one_process")
    return WRAPPERS[request.param]


@pytest.fixture(params=MODELS)
def make(request):
    return MODELS[request.param]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning:peft")
class TestWrappers:
    """Whatever a model is wrapped in, it is known, checked and decoded as the bare one is."""

    def test_tokens_are_those_of_the_bare_model(self, wrap, make):
        def decode(model):
            sampler = Sampler(model, Words(), decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
            return sampler, sampler([[5, 6, 7], [8]], max_new_tokens=5).sequences.tolist()

        bare, expected = decode(make())
        wrapped, found = decode(wrap(make()))
        assert found == expected
        assert wrapped.denoiser.family == bare.denoiser.family
        assert wrapped.denoiser.probe() == bare.denoiser.probe()
        assert wrapped.denoiser.pad_token_id == bare.denoiser.pad_token_id
        assert wrapped.denoiser.call.num_embeddings == VOCABULARY

    def test_it_goes_through_the_wrapper(self, wrap, make):
        wrapped, calls = wrap(make()), []
        if isinstance(wrapped, torch._dynamo.OptimizedModule) or not isinstance(wrapped, nn.Module):
            pytest.skip("runs no hooks of its own")
        wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
        denoiser = Denoiser(wrapped, mask_token_id=MASK)
        calls.clear()
        Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=2)))([[5]], max_new_tokens=4)
        assert len(calls) == 2

    @pytest.mark.parametrize(
        ("options", "call", "message"),
        [
            ({"is_causal": True}, lambda d: None, "ignores the future"),
            ({"attention_dropout": 0.5}, lambda d: None, "is in training mode and drops activations at random"),
            ({"time_conditioning": True}, lambda d: None, "conditioned on time"),
            ({"vocab_size": 8}, lambda d: d, "token id 9 is out of range: the model has ids from 0 to 7"),
        ],
    )
    def test_what_is_refused_bare_is_refused_wrapped(self, wrap, options, call, message):
        model = tiny_model(**options)
        wrapped = wrap(model)
        (wrapped if isinstance(wrapped, nn.Module) else model).train("attention_dropout" in options)
        model = wrapped
        with pytest.raises(NapDecodeError, match=message):
            Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=1)))([[9]], max_new_tokens=1)

    def test_the_mask_is_found(self, wrap):
        assert Denoiser(wrap(tiny_model(mask_token_id=7))).mask_token_id == 7

    def test_reuse(self, wrap):
        if wrap is WRAPPERS["torch.compile"]:
            pytest.skip("a module that is compiled as a whole compiles a graph for each cache")
        outputs = []
        for model in (tiny_model(), wrap(tiny_model())):
            denoiser = Denoiser(model, Words(), reuse=CommittedReuse())
            sampler = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
            outputs.append(sampler([[5, 6, 7], [8]], max_new_tokens=5).sequences.tolist())
        assert outputs[0] == outputs[1]


class TestWhatIsNoWrapper:
    def test_blocks_that_nothing_could_be_told_of(self):
        class Blocks(Remote):
            def forward(self, input_ids, position_ids=None):
                return self.run(input_ids, position_ids, None)

        with pytest.raises(
            NapDecodeError, match="SDAR models are told their blocks by an attention_mask, but the forward"
        ):
            Denoiser(Blocks("sdar"), mask_token_id=MASK)

    def test_what_names_nothing_and_wraps_nothing_that_does(self):
        model = Generating("Dream", mask_token_id=MASK)

        class Both(nn.Module):
            def __init__(self):
                super().__init__()
                self.policy, self.value = model, DreamLike("bert")

            def forward(self, *args, **kwargs):
                return self.policy(args[0])

        class Held(nn.Module):
            def forward(self, *args, **kwargs):
                return model(args[0])

        for module in (Both(), Held()):
            with pytest.raises(NapDecodeError, match="names no arguments, and what it wraps is not to be found"):
                Denoiser(module, mask_token_id=MASK)
            shifted = Denoiser(module, mask_token_id=MASK, family=ModelFamily(name="mine", shift=True))
            assert shifted.family.shift

    def test_a_module_without_a_config_around_a_model_of_a_family(self):
        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = Generating("Dream", mask_token_id=MASK)

            def forward(self, input_ids, attention_mask=None):
                return self.model(input_ids)

        with pytest.warns(UserWarning, match="there is a Dream model in Around, which has no config"):
            Denoiser(Around(), mask_token_id=MASK)

    def test_a_module_with_a_config_that_cannot_be_read(self):
        class Opaque(nn.Module):
            config = SimpleNamespace(model_type="mine", vocab_size=VOCABULARY)

            def forward(self, *args, **kwargs):
                return torch.zeros(*args[0].shape, VOCABULARY)

        with pytest.raises(
            NapDecodeError, match="the forward of Opaque names no arguments, and what it wraps is not to be found"
        ):
            Denoiser(Opaque(), mask_token_id=MASK)

    def test_a_module_that_uses_another_one(self):
        """It is called with ids and mask, whatever stands in it."""

        class Uses(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = tiny_model()

            def forward(self, ids, mask):
                return self.inner(input_ids=ids, attention_mask=mask).logits.roll(1, dims=2)

        module = Uses()
        assert foreign.innermost(module) is module
        assert Denoiser(module, mask_token_id=MASK).call.config is None

    def test_two_modules_inside(self):
        class Two(Passes):
            def __init__(self):
                super().__init__(tiny_model())
                self.other = tiny_model()

        two = Two()
        assert foreign.innermost(two) is two

    def test_a_head_model_is_not_taken_for_its_body(self):
        model = tiny_model()
        assert foreign.unwrapped(model) == [model]

    def test_functions(self):
        assert foreign.innermost(abs) is abs


class TestIdsAlone:
    ROW = ((5, MASK, 6, MASK),)

    def test_functions_modules_and_torchscript(self):
        class Alone(nn.Module):
            def forward(self, x):
                return nn.functional.one_hot(x.roll(1, dims=1) + 1, 24).float()

        expected = Sampler(Alone().forward, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2))).infill(
            self.ROW
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated
            models = [Alone(), torch.jit.script(Alone()), torch.jit.trace(Alone(), torch.tensor(self.ROW))]
            for model in models:
                found = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2))).infill(self.ROW)
                assert found.sequences.tolist() == expected.sequences.tolist()

    def test_ragged_rows_go_in_groups(self):
        seen = []

        def model(ids):
            seen.append(tuple(ids.shape))
            return torch.zeros(*ids.shape, 24)

        sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=1)))
        with pytest.warns(UserWarning, match="takes no mask"):
            sampler([[5], [6, 7], [8]], max_new_tokens=1)
        assert sorted(seen) == [(1, 3), (2, 2)]


class TestMaskArgument:
    @pytest.mark.parametrize(
        ("function", "expected"),
        [
            (lambda ids, mask: 0, 1),
            (lambda ids, seen: 0, 1),
            (lambda ids, mask=None: 0, 1),
            (lambda ids, sigma=None: 0, None),
            (lambda ids, model=None, scale=1: 0, None),
            (lambda ids, position_ids=None, attention_mask=None: 0, "attention_mask"),
            (lambda ids, *, attention_mask: 0, "attention_mask"),
            (lambda *args: 0, 1),
            (lambda ids: 0, None),
        ],
    )
    def test_where_it_goes(self, function, expected):
        assert foreign.mask_argument(function) == expected

    def test_what_else_may_be_given_is_left_alone(self):
        model = tiny_model()
        plain = Sampler(
            lambda ids: model(input_ids=ids).logits, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2))
        )

        def timed(ids, sigma=None, *, attention_mask=None):
            assert sigma is None
            return model(input_ids=ids).logits

        sampler = Sampler(timed, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
        rows = [[5, MASK, 6, MASK]]
        assert sampler.infill(rows).sequences.tolist() == plain.infill(rows).sequences.tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "use_sliding_window": False}, None),
        ({"sliding_window": None}, None),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 8}, None),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, 8),
        ({"layer_types": ["full_attention", "chunked_attention"]}, 1),
        ({"global_attn_every_n_layers": 3, "local_attention": 128}, 128),
        ({"global_attn_every_n_layers": 1, "local_attention": 128}, None),
    ],
)
def test_windows(options, expected):
    assert foreign.attention_window(SimpleNamespace(**options)) == expected


class TestPositions:
    class Table(Remote):
        def __init__(self, limit, **options):
            super().__init__("table", max_position_embeddings=limit, **options)

        def forward(self, input_ids, attention_mask=None):
            return self.run(input_ids, None, None)

    def decode(self, model, length):
        sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=1)))
        return sampler([[5] * (length - 1)], max_new_tokens=1)

    def test_a_table_ends(self):
        model = self.Table(80)  # the table of a StandIn
        self.decode(model, 80)
        with pytest.raises(NapDecodeError, match=r"takes 81 positions .* but the model has 80; shorten"):
            self.decode(model, 81)

    @pytest.mark.parametrize(
        ("options", "longest"),
        [
            ({}, 32),
            ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}}, 64),
            ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, 64),
            ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}}, 96),
            ({"rope_scaling": {"factor": 0.5}}, 32),
        ],
    )
    def test_rotary_ones_go_on_with_a_warning(self, options, longest):
        config = SimpleNamespace(max_position_embeddings=32, **options)
        assert foreign.position_limit(nn.Linear(2, 2), config, None) == (longest, False)

    def test_the_warning(self):
        model = tiny_model(max_position_embeddings=16)
        self.decode(model, 16)
        with pytest.warns(UserWarning, match="takes 17 positions .* more than the 16 that the model's config names"):
            out = self.decode(model, 17)
        assert out.sequences.shape == (1, 17)


class TestVirtualTokens:
    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
    @pytest.mark.parametrize("task", ["CAUSAL_LM"])
    def test_of_prompt_tuning_are_cut_off(self, task):
        peft = pytest.importorskip("peft")
        model = tiny_model()
        config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            wrapped = peft.get_peft_model(model, config).double().eval()
        virtual = wrapped.get_prompt(1)[:1]  # (1, 3, H)

        def by_hand(ids, mask):
            embedded = torch.cat([virtual.expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], dim=1)
            there = torch.zeros(len(ids), 1, embedded.shape[1], embedded.shape[1], dtype=torch.float64)
            return model(inputs_embeds=embedded, attention_mask=there).logits[:, 3:]

        def decode(one):
            sampler = Sampler(one, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
            return sampler([[5, 6, 7]], max_new_tokens=4).sequences.tolist()

        assert decode(wrapped) == decode(by_hand)
        assert decode(wrapped) != decode(model)
        sampler = Sampler(wrapped, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
        together = sampler([[5, 6, 7], [8]], max_new_tokens=4).sequences
        for row, prompt in enumerate([[5, 6, 7], [8]]):
            alone = sampler([prompt], max_new_tokens=4).sequences[0]
            assert torch.equal(together[row, : len(alone)], alone)
        with pytest.raises(NapDecodeError, match="the sampler is for another model"):
            check_same_model(sampler, model)

    @pytest.mark.parametrize("difference", [-1, 1, 4])
    @pytest.mark.parametrize("kind", ["function", "module"])
    def test_logits_of_another_width_are_refused(self, difference, kind):
        def other(logits):
            return logits[:, :difference] if difference < 0 else torch.cat([logits[:, :difference], logits], dim=1)

        class Other(Remote):
            def forward(self, input_ids, attention_mask=None):
                return SimpleNamespace(logits=other(self.run(input_ids, None, None).logits))

        module = Other("other")
        model = module if kind == "module" else lambda ids, mask: module(ids)

        def decode():
            sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=1)))
            sampler([[5, 6, 7, 8, 9]], max_new_tokens=2)

        with pytest.raises(NapDecodeError, match="must return logits for every position, but returned"):
            decode()


def test_a_model_whose_weights_are_nowhere():
    model = tiny_model().to("meta")
    with pytest.raises(NapDecodeError, match=r"weights of LlamaForCausalLM are on no device \(meta\); .* pass device="):
        Denoiser(model, mask_token_id=MASK)


def test_offloaded_models():
    accelerate = pytest.importorskip("accelerate")
    expected = Sampler(tiny_model(), mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
    model = accelerate.cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    found = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
    for prompts in ([[5, 6]], [[5, 6], [7]]):
        ours, theirs = found(prompts, max_new_tokens=4), expected(prompts, max_new_tokens=4)
        assert ours.sequences.tolist() == theirs.sequences.tolist()


@pytest.mark.parametrize("make", [tiny_model, lambda: Generating("Dream", mask_token_id=MASK)])
def test_autocast(make):
    """On the CPU, too: what the model says in it is what is decoded."""
    model = make().float()
    sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(tokens_per_step=1)))
    shifted = int(sampler.denoiser.family.shift)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sampler([[5, 6, 7]], max_new_tokens=1)
        logits = model(input_ids=torch.tensor([[5, 6, 7, MASK]])).logits[0, 3 - shifted].float()
    logits[MASK] = -torch.inf
    assert out.sequences[0, -1] == logits.argmax()


@pytest.mark.parametrize("pad", [-1, VOCABULARY, 1000])
def test_a_padding_id_that_the_model_does_not_have(pad):
    model = tiny_model()
    model.config.pad_token_id = pad
    right = Sampler(tiny_model(), mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
    sampler = Sampler(model, mask_token_id=MASK, decoder=Decoder(AnyOrderScheduler(steps=2)))
    assert sampler.denoiser.pad_token_id == MASK  # which attention hides
    ours, theirs = (one([[5, 6], [7]], max_new_tokens=4).sequences for one in (sampler, right))
    assert ours[0].tolist() == theirs[0].tolist()
    assert ours[1, :5].tolist() == theirs[1, :5].tolist()
    assert PAD != MASK


@pytest.mark.parametrize("family", [None, ModelFamily(name="some", shift=True)])
def test_a_mask_that_is_not_scored(family):
    """Embeddings for one id more than there are logits, as SMDM's models have."""
    table = torch.randn(VOCABULARY + 1, VOCABULARY, generator=torch.Generator().manual_seed(0))

    class Module(Remote):
        def __init__(self):
            super().__init__("some", vocabulary=VOCABULARY + 1)
            self.head = nn.Linear(16, VOCABULARY).double()

        def forward(self, input_ids, attention_mask=None):
            seen = None if attention_mask is None else attention_mask[:, None, None].bool()
            return self.run(input_ids, None, seen)

    for model in (Module(), lambda ids, mask: table[ids]):
        denoiser = Denoiser(model, mask_token_id=VOCABULARY, family=family)
        out = Sampler(denoiser, decoder=Decoder(AnyOrderScheduler(steps=2)))([[5, 6], [7]], max_new_tokens=4)
        assert int(out.sequences[out.canvas.decodable].max()) < VOCABULARY
