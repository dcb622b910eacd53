"""What a prompt's language and guidance do to a run, against loops written by hand on the model's parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax import guidance, noise, program, prompts, samplers
from sdjax.job import Guide, Inputs, Job
from sdjax.models.layers import apply
from sdjax.models.perturbed import identity_attention
from sdjax.models.unet import UNet

pytestmark = pytest.mark.usefixtures("no_disk_cache")

SIZE = {"height": 24, "width": 32}
STEPS, SCALE = 4, 5.0
START = np.random.default_rng(0).normal(size=(1, 12, 16, 4)).astype(np.float32)


@pytest.fixture
def make(tiny):
    """The latents of one picture."""

    def make(prompt, negative_prompt="", **options):
        options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "sampler": "euler", "seed": 3, **options}
        return sdjax.generate(
            prompt, negative_prompt, model=tiny, latents=START, output_type="latent", **SIZE, **options
        )

    return make


@pytest.fixture
def by_hand(tiny):
    """The same by a sampler's own function in float64, calling the model's parts."""

    def by_hand(guide, sampler="euler", noises=None):
        """guide(output, step) -> guided output, where output(text) is the model's for a text, or for a context."""
        sampler = tiny.sampler(sampler)
        rows = sampler.rows(STEPS)

        class Machine:
            def evaluate(self, x_in, call):
                def output(context):
                    if isinstance(context, str):
                        context = tiny.encode_text(tiny.tokenizer([context]))
                    x = np.asarray(x_in, np.float32)
                    return np.asarray(tiny.unet(x, np.float32(call.time), context), np.float64)

                output.x, output.time = np.asarray(x_in, np.float32), np.float32(call.time)
                m = guide(output, call.step)
                return m, m

            def normal(self, row, span):
                return noises[row]

            def end_step(self, x, row, blend):
                return x

        return sampler.run(Machine(), START * float(rows.start_noise), STEPS)[1]

    return by_hand


def plain(output, text, negative=""):
    u = output(negative)
    return u + SCALE * (output(text) - u)


def assert_close(found, expected):
    """Float32 against float64 over a whole guided run."""
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 1e-4, f"off by {error:.1e}"


@pytest.mark.slow
def test_the_loop_by_hand_is_the_program_s(make, by_hand):
    assert_close(make("a cat", "a dog"), by_hand(lambda output, step: plain(output, "a cat", "a dog")))


def test_and(make, by_hand):
    """Liu et al. 2022: the weighted sum of each prompt's direction."""

    def guide(output, step):
        u = output("blurry")
        return u + SCALE * (1.2 * (output("a cat") - u) + 0.5 * (output("a dog") - u))

    assert_close(make("a cat :1.2 AND a dog:0.5", "blurry"), by_hand(guide))


def test_words_change_at_their_step(make, by_hand):
    def guide(output, step):
        return plain(output, "a cat" if step < 2 else "a dog", "red" if step % 2 == 0 else "blue")

    assert_close(make("a [cat:dog:2]", "[red|blue]"), by_hand(guide))


def test_weighted_words(make, by_hand, tiny):
    ids = tiny.tokenizer(["a cat in a hat"])
    weights = np.ones((1, 77), np.float32)
    weights[0, 2] = 1.5  # after the start token and "a"
    context = prompts.emphasize(np.asarray(tiny.encode_text(ids)), weights)
    assert_close(make("a (cat:1.5) in a hat"), by_hand(lambda output, step: plain(output, context)))


def test_markup_of_weight_1_changes_no_bit(make):
    assert np.array_equal(make("a (cat:1.0)"), make("a cat"))


@pytest.mark.slow
def test_switching_points_and_weights_compile_nothing(make):
    make("a [cat:dog:2] AND (a:1.1) hat:0.5")
    size = program.run_scanned.jitted._cache_size()
    make("a [bird|fox] AND (b:1.3) shoe:2")
    make("[one:two:0.25] AND three")
    assert program.run_scanned.jitted._cache_size() == size


@pytest.mark.slow
def test_guidance_in_an_interval(make, by_hand, tiny):
    def guide(output, step):
        return plain(output, "a cat") if step in (1, 2) else output("a cat")

    options = guidance.Options(interval=(0.25, 0.75))
    assert_close(make("a cat", guidance=options), by_hand(guide))
    assert_close(make("a cat", guidance=options, callback=lambda *_: None), by_hand(guide))


def test_outside_of_the_interval_half_is_not_computed(tiny):
    """The program holds the UNet twice, one of them for half the batch, in a branch of its own."""
    rows = samplers.create("euler", prediction=tiny.config.prediction).rows(STEPS).from_noise().padded(64)
    prompt, negative = prompts.encode(tiny.tokenizer, ["a cat"], [""], STEPS)
    prompt, negative = (each._replace(variants=each.variants[..., rows.step]) for each in (prompt, negative))
    job = Job(tiny.config, "float32", 24, 32, guided=True)

    def text(within):
        guide = Guide(np.full(64, SCALE, np.float32), np.float32(0), within)
        inputs = Inputs(prompt, negative, None, noise.seed_words([1]), rows, guide)
        return program.run_scanned.jitted.lower(job, tiny.params, inputs).as_text()

    with_one, with_both = text(None), text(np.ones(64, bool))
    assert with_both.count("stablehlo.case") == with_one.count("stablehlo.case") + 1
    # The maps of the lowest level: of both halves, and of one.
    width = tiny.config.unet.channels[-1]
    assert f"tensor<2x6x8x{width}xf32>" in with_one
    assert f"tensor<1x6x8x{width}xf32>" not in with_one
    assert f"tensor<1x6x8x{width}xf32>" in with_both


@pytest.mark.slow
def test_a_threshold(make):
    """The last step of Euler's method ends at the predicted latents."""
    free = np.abs(make("a cat"))
    limit = float(np.quantile(free, 0.5))
    cut = np.abs(make("a cat", guidance=guidance.Options(threshold=limit)))
    assert cut.max() <= limit * (1 + 1e-5)
    assert (cut > 0.999 * limit).mean() > 0.2
    scaled = np.abs(make("a cat", guidance=guidance.Options(threshold=limit, quantile=0.9)))
    assert scaled.max() <= limit * (1 + 1e-5)
    assert 0.05 < (scaled > 0.999 * limit).mean() < 0.15
    none = make("a cat", guidance=guidance.Options(threshold=1e5))
    np.testing.assert_allclose(none, make("a cat"), atol=1e-4 * free.max())


def test_a_perpendicular_negative_prompt(make, by_hand):
    def guide(output, step):
        u = output("")
        main, other = output("a cat") - u, output("a dog") - u
        other = other - (main * other).sum() / (main * main).sum() * main
        return u + SCALE * (main - 0.7 * other)

    found = make("a cat", "a dog", guidance=guidance.Options(perpendicular=0.7))
    assert_close(found, by_hand(guide))


def test_regions(make, by_hand):
    """Each prompt counts where its mask is white; latents at the edge take the share of their pixels."""
    left = np.zeros((24, 32), bool)
    left[:, :17] = True  # half of a latent's two pixels
    share = np.zeros((1, 12, 16, 1))
    share[:, :, :8], share[:, :, 8] = 1.0, 0.5

    def guide(output, step):
        u = output("")
        return u + SCALE * (1.5 * share * (output("a cat") - u) + (1 - share) * (output("a dog") - u))

    assert_close(make("a cat:1.5 AND a dog", regions=[left, ~left]), by_hand(guide))
    for prompt, regions in (("a cat AND a dog", [left]), ("a cat", [left, left]), ("a cat", [left])):
        with pytest.raises(ValueError, match=r"regions: got [12] masks; every prompt must join as many prompts by AND"):
            make(prompt, regions=regions)


@pytest.mark.slow
def test_guidance_by_a_loss(make, tiny):
    """The last step of one: x0 minus the scaled gradient through decoder, guidance and UNet."""

    def loss(pictures):
        return jnp.square(pictures - 0.25).mean((1, 2, 3))

    options = {"num_inference_steps": 1, "sampler": "ddim", "guidance_scale": SCALE}
    found = make("a cat", guidance=guidance.Options(loss=loss, loss_scale=3.0), **options)
    contexts = [tiny.encode_text(tiny.tokenizer([text])) for text in ("", "a cat")]
    sampler = tiny.sampler("ddim")
    rows = sampler.rows(1, dtype=np.float64)

    def x0(x):
        u, c = (tiny.unet(x, np.float32(rows.time[0]), context) for context in contexts)
        m = u + SCALE * (c - u)
        return float(rows.to_x0[0, 0]) * x + float(rows.to_x0[0, 1]) * m, m

    gradient = jax.grad(lambda x: loss(tiny.decode_latents(x0(x)[0] / tiny.config.vae.scaling_factor)).sum())(START)
    m = np.asarray(x0(START)[1]) - 3.0 * np.asarray(gradient) / rows.to_x0[0, 1]
    expected = rows.update[0, 0, 0] * START + rows.update[0, 0, samplers.REGISTERS + 1] * m
    assert np.abs(gradient).max() > 1e-4
    assert_close(found, expected)


@pytest.mark.slow
def test_perturbed_attention(make, by_hand, tiny):
    """By hand: the UNet alone, its middle self-attention replaced."""

    def perturbed(context, x, time):
        with identity_attention(np.ones(1, bool)):
            return apply(UNet(tiny.config.unet), tiny.params["unet"], x, jnp.full(1, time), context, None)

    compiled = jax.jit(perturbed)
    context = tiny.encode_text(tiny.tokenizer(["a cat"]))

    def guide(output, step):
        u, c = output(""), output("a cat")
        return u + SCALE * (c - u) + 2.0 * (c - np.asarray(compiled(context, output.x, output.time), np.float64))

    options = guidance.Options(perturbed=2.0)
    found = make("a cat", guidance=options)
    assert_close(found, by_hand(guide))
    assert np.abs(found - make("a cat")).max() > 1e-3
    with pytest.raises(ValueError, match=r"guidance\.perturbed: it is away from one prompt's output, and AND joins"):
        make("a cat AND a dog", guidance=options)


@pytest.mark.slow
def test_brownian_noise(make, by_hand):
    rows = samplers.create("euler_ancestral").rows(STEPS)
    noises = np.asarray(jax.jit(noise.brownian, static_argnums=2)(noise.seed_words([3]), rows.span, START.shape[1:]))
    expected = by_hand(lambda output, step: plain(output, "a cat"), "euler_ancestral", noises)
    found = make("a cat", sampler="euler_ancestral", brownian=True)
    assert_close(found, expected)
    assert np.array_equal(make("a cat", sampler="euler_ancestral", brownian=True, callback=lambda *_: None), found)
    assert np.abs(make("a cat", sampler="euler_ancestral") - found).max() > 0.1
    with pytest.raises(ValueError, match="brownian: restart goes back up in noise"):
        make("a cat", sampler="restart", num_inference_steps=20, brownian=True)


@pytest.mark.slow
def test_exact_steps(tiny):
    image = np.random.default_rng(1).integers(0, 256, (24, 32, 3), np.uint8)

    def make(steps, **options):
        return sdjax.generate(
            "a cat",
            model=tiny,
            image=image,
            strength=0.5,
            seed=1,
            num_inference_steps=steps,
            output_type="np",
            **options,
        )

    assert np.array_equal(make(3, exact_steps=True), make(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": 1.5}, "guidance.rescale: expected a number from 0 to 1, got 1.5"),
        ({"interval": (0.5, 0.5)}, r"guidance.interval: expected start < stop, got \(0.5, 0.5\)"),
        ({"interval": 0.5}, r"guidance.interval: expected \(start, stop\), got 0.5"),
        ({"interval": (0.0, 2.0)}, "guidance.interval: expected a number from 0 to 1, got 2.0"),
        ({"threshold": 0.0}, "guidance.threshold: expected a number from 0.001 to 1e.06, got 0.0"),
        ({"quantile": 0.9}, "guidance.quantile: it says how to reach a threshold, and there is none"),
        ({"perpendicular": True}, "guidance.perpendicular: expected a number from 0 to 1000, got True"),
    ],
)
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message):
        guidance.Options(**options)


def test_an_interval_and_and(make):
    with pytest.raises(ValueError, match=r"guidance\.interval: outside of it one prompt is evaluated, and AND joins"):
        make("a cat AND a dog", guidance=guidance.Options(interval=(0.0, 0.5)))


def test_a_sampler_that_goes_the_other_way(make):
    with pytest.raises(ValueError, match="sampler: ddim_inverse goes from a picture to noise"):
        make("a cat", sampler="ddim_inverse")
