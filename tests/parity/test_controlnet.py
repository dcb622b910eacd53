"""ControlNets against diffusers' model and pipeline, from its own folder and under the original names."""

import dataclasses

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image

import sdjax
from sdjax import pipeline
from sdjax.checkpoints import CheckpointError, controlnet, names, native, safetensors, weights
from sdjax.control import read as read_controls
from sdjax.models.config import SD1, TINY, TINY_2
from sdjax.models.controlnet import ControlNet
from sdjax.models.unet import UNet

from .test_checkpoints import NARROW
from .test_models import TOLERANCE, enliven, redraw, relative_error, text_encoder, unet, vae, write_folder

HINT = (16, 32)  # the tiny autoencoder's factor is 2


def control_of(config, hint=HINT):
    sizes = config.unet
    kinds = ["CrossAttn" if attends else "" for attends in sizes.attention_levels]
    return diffusers.ControlNetModel(
        in_channels=4,
        block_out_channels=sizes.channels,
        layers_per_block=sizes.blocks_per_level,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        attention_head_dim=sizes.num_heads,
        use_linear_projection=sizes.linear_projection,
        cross_attention_dim=sizes.context_width,
        norm_num_groups=sizes.norm_groups,
        conditioning_embedding_out_channels=hint,
    )


def live(config, seed, hint=HINT):
    """Zero convolutions of a fresh one would hide everything."""
    zeros = ["controlnet_down", "controlnet_mid", "embedding.conv_out"]
    return redraw(enliven(control_of(config, hint), seed), zeros, 0.1, seed)


@pytest.fixture(scope="module", params=[TINY, TINY_2], ids=["SD 1", "SD 2"])
def both(request, tmp_path_factory):
    """diffusers' parts with two ControlNets, and our model with the same."""
    config, folder = request.param, tmp_path_factory.mktemp("controlnet")
    parts = {"text_encoder": text_encoder(config), "unet": unet(config), "vae": vae(config)}
    for seed, model in enumerate(parts.values()):
        enliven(model, seed)
    write_folder(folder / "model", config, parts)
    controls = [live(config, 7), live(config, 8)]
    model = sdjax.load(folder / "model", dtype="float32")
    for name, control in zip("ab", controls, strict=True):
        control.save_pretrained(folder / name)
        model = model.with_controlnet(folder / name)
    return {**parts, "controls": controls}, model, folder


@pytest.mark.slow
def test_outputs(both):
    parts, model, _ = both
    check(parts["controls"][0], parts["unet"], model.controls["a"].params, model.params["unet"], model.config, (13, 9))


def check(control, unet, control_params, unet_params, config, size, hint_channels=HINT, batch=2):
    """What the ControlNet puts out, and what the UNet makes of it."""
    rng = np.random.default_rng(0)
    factor = config.vae.factor
    latents = rng.normal(size=(batch, *size, 4)).astype(np.float32)
    context = rng.normal(size=(batch, 77, config.unet.context_width)).astype(np.float32)
    hint = rng.uniform(size=(batch, factor * size[0], factor * size[1], 3)).astype(np.float32)
    times = np.array([999, 3], np.float32)[:batch]
    with torch.no_grad():
        x, c, h = (torch.from_numpy(a) for a in (np.moveaxis(latents, -1, 1), context, np.moveaxis(hint, -1, 1)))
        down, middle = control(x, torch.from_numpy(times), c, h, return_dict=False)
        expected = unet(
            x, torch.from_numpy(times), c, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
    net = ControlNet(config.unet, hint_channels)
    added, mid = jax.jit(net.apply)({"params": control_params}, latents, times, context, hint)
    assert len(added) == len(down)
    for ours, theirs in zip([*added, mid], [*down, middle], strict=True):
        assert relative_error(ours, np.moveaxis(theirs.numpy(), 1, -1)) < TOLERANCE
    output = jax.jit(UNet(config.unet).apply)({"params": unet_params}, latents, times, context, None, (added, mid))
    assert relative_error(output, np.moveaxis(expected.numpy(), 1, -1)) < TOLERANCE


def original(control, config, hint=HINT):
    """The same tensors under the original names."""
    theirs = {f"control.{name}": x.numpy() for name, x in control.state_dict().items()}
    leaves = native.flatten({"control": pipeline.control_shapes(config, hint)})
    ours = weights.assemble("x", theirs, names.folder(config, leaves), leaves)
    return weights.export(ours, names.ldm(config, leaves))


def test_original_names(both):
    parts, model, folder = both
    tensors = original(parts["controls"][0], model.config)
    assert all(name.startswith("control_model.") for name in tensors)
    own = parts["controls"][0].state_dict()
    whole = tensors | {"model.diffusion_model.input_blocks.0.0.bias": np.ones(3, np.float32)}
    bare = {name.removeprefix("control_model."): x for name, x in tensors.items()}
    flat = {name: x.numpy() for name, x in own.items()}
    for i, form in enumerate((tensors, whole, bare, flat)):
        safetensors.write(folder / f"{i}.safetensors", form, {})
        found = model.with_controlnet(folder / f"{i}.safetensors").controls[str(i)].params
        expected = native.flatten(model.controls["a"].params)
        assert native.flatten(found).keys() == expected.keys()
        assert all(np.array_equal(x, expected[name]) for name, x in native.flatten(found).items())


def test_diffusers_converter_reads_our_names():
    control = control_of(NARROW, (4, 4, 8, 8))
    tensors = original(control, NARROW, (4, 4, 8, 8))
    theirs = convert_controlnet_checkpoint(
        {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}, dict(control.config)
    )
    own = control.state_dict()
    assert theirs.keys() == own.keys()
    assert all(torch.equal(theirs[name], x) for name, x in own.items())


@pytest.mark.slow
def test_whole_runs(both):
    """Two ControlNets with a scale each, one for part of the steps, against diffusers' pipeline."""
    parts, model, _ = both
    rng = np.random.default_rng(3)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 24, 3), np.uint8)) for _ in range(2)]
    noise = rng.normal(size=(1, 16, 12, 4)).astype(np.float32)
    prediction = {"epsilon": "epsilon", "v": "v_prediction"}[model.config.prediction]
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, prediction_type=prediction,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionControlNetPipeline(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        unet=parts["unet"],
        tokenizer=None,
        controlnet=parts["controls"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    texts = [torch.from_numpy(np.array(model.encode_text(model.tokenizer([text])))) for text in ("a cat", "")]
    expected = pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        image=[picture.copy() for picture in pictures],
        num_inference_steps=8,
        guidance_scale=4.0,
        controlnet_conditioning_scale=[0.8, 1.3],
        control_guidance_start=[0.0, 0.25],
        control_guidance_end=[1.0, 0.75],
        latents=torch.from_numpy(np.moveaxis(noise, -1, 1)),
        height=32,
        width=24,
        output_type="latent",
    ).images
    options = {"sampler": "ddim", "num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "latent"}
    controls = {
        "a": sdjax.Control(pictures[0], 0.8),
        "b": sdjax.Control(pictures[1], [1.3] * 8, interval=(0.25, 0.75)),
    }
    size = {"height": 32, "width": 24}
    ours = sdjax.generate("a cat", model=model, latents=noise, controls=controls, **size, **options)
    assert relative_error(ours, np.moveaxis(expected.numpy(), 1, -1)) < TOLERANCE
    without = sdjax.generate("a cat", model=model, latents=noise, **size, **options)
    assert relative_error(without, np.moveaxis(expected.numpy(), 1, -1)) > 1e-2
    none = {name: dataclasses.replace(control, scale=0.0) for name, control in controls.items()}
    off = sdjax.generate("a cat", model=model, latents=noise, controls=none, **size, **options)
    assert relative_error(off, without) < TOLERANCE


@pytest.mark.slow
def test_numbers_and_pictures_compile_nothing(both, compilations):
    _, model, _ = both
    if model.config != TINY:
        pytest.skip("the same program")
    options = {"model": model, "num_inference_steps": 3, "height": 16, "width": 16, "seed": 0}
    white = np.full((16, 16, 3), 255, np.uint8)
    one = sdjax.generate("a cat", controls={"a": sdjax.Control(white)}, **options)[0]
    assert '"controls": {"a": {"scale": 1.0, "interval": [0.0, 1.0]' in one.info["sdjax"]
    sdjax.recipe.from_json(one.info["sdjax"])
    compilations.clear()
    other = sdjax.Control(np.zeros((40, 30, 3), np.uint8), 0.5, (0.0, 0.5))
    sdjax.generate("a dog", controls={"a": other}, sampler="euler", **options)
    assert not compilations
    # One picture per prompt, and several per picture.
    pair = {"a": sdjax.Control([white, 0 * white])}
    pictures = sdjax.generate(["a cat", "a cat"], controls=pair, num_images_per_prompt=2, **options)
    assert len(pictures) == 4
    assert np.abs(np.asarray(pictures[0], np.int16) - np.asarray(one, np.int16)).max() <= 1
    scanned = np.asarray(sdjax.generate("a cat", controls={"a": sdjax.Control(white)}, **options)[0])
    stepwise = sdjax.generate("a cat", controls={"a": sdjax.Control(white)}, callback=lambda *_: None, **options)[0]
    assert np.array_equal(scanned, stepwise)


@pytest.mark.slow
def test_over_a_mesh(both):
    _, model, _ = both
    mesh = jax.make_mesh((1,), ("batch",))
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "seed": 0, "output_type": "np"}
    control = {"a": sdjax.Control(np.full((16, 16, 3), 99, np.uint8))}
    one = sdjax.generate(["a", "b"], model=model, controls=control, **options)
    assert (
        np.abs(one.astype(int) - sdjax.generate(["a", "b"], model=model, controls=control, mesh=mesh, **options)).max()
        <= 1
    )


def test_refusals(both, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors, "is_finite", lambda _: True)  # to write what is refused
    parts, model, folder = both
    white = np.full((16, 16, 3), 255, np.uint8)
    for controls, message in (
        ({"c": sdjax.Control(white)}, "the model has no ControlNet 'c'; it has a, b"),
        ({"a": white}, "expected a sdjax.Control for 'a'"),
        ({"a": sdjax.Control([white, white])}, "got 2 pictures for 'a' and 1 prompts"),
        ({"a": sdjax.Control(white, [1.0])}, r"controls\['a'\].scale: got 1 numbers for num_inference_steps=3"),
        ({"a": sdjax.Control(white, np.nan)}, "expected finite numbers"),
        ({"a": sdjax.Control("nowhere.png")}, r"controls\['a'\].image"),
    ):
        with pytest.raises(ValueError, match=message):
            sdjax.generate("a cat", model=model, num_inference_steps=3, controls=controls)
    with pytest.raises(ValueError, match="an interval is two numbers"):
        sdjax.Control(white, interval=(0.5, 0.5))
    with pytest.raises(ValueError, match="there is a ControlNet 'a' already"):
        model.with_controlnet(folder / "a")
    tensors = original(parts["controls"][0], model.config)
    bias = "control_model.zero_convs.0.0.bias"
    for wrong, message in (
        ({"a": np.ones(3)}, "no ControlNet 1.x for this model"),
        (tensors | {bias: tensors[bias] * np.nan}, "NaN or infinity"),
        (tensors | {bias: tensors[bias][:3]}, "wrong shape"),
        ({name: x for name, x in tensors.items() if name != bias}, r"missing \(1\)"),
        (tensors | {"control_model.label_emb.0.bias": np.ones(3)}, r"unexpected \(1\)"),
        (tensors | {"difference": np.zeros(0, np.float32)}, "the differences of a ControlNet from the UNet"),
    ):
        safetensors.write(tmp_path / "wrong.safetensors", wrong, {})
        with pytest.raises(CheckpointError, match=message):
            model.with_controlnet(tmp_path / "wrong.safetensors")
    with pytest.raises(CheckpointError, match="it configures 'UNet2DConditionModel'"):
        model.with_controlnet(folder / "model" / "unet")
    with pytest.raises(CheckpointError, match="for another model: attention has"):
        controlnet.read(folder / "a", SD1, pipeline.control_shapes)


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)])
@pytest.mark.parametrize(("steps", "first"), [(50, 0), (50, 25), (7, 3)])
def test_an_interval_is_of_the_steps_that_are_made(interval, steps, first):
    """As diffusers' pipelines keep a ControlNet, over the timesteps that image to image leaves."""
    white = np.full((16, 16, 3), 255, np.uint8)
    _, scales = read_controls({"a": sdjax.Control(white, 0.5, interval)}, ["a"], 1, (16, 16), steps, first)["a"]
    timesteps = range(steps - first)
    start, end = interval
    keeps = [1.0 - float(i / len(timesteps) < start or (i + 1) / len(timesteps) > end) for i in timesteps]
    np.testing.assert_array_equal(scales[first:], np.array(keeps) * 0.5)


def test_full_size_names():
    """The published numbers of tensors: 340 in control_v11p_sd15_*.pth."""
    leaves = native.flatten({"control": pipeline.control_shapes(SD1, (16, 32, 96, 256))})
    table = {source.name for source in names.ldm(SD1, leaves).values()}
    assert len(table) == len(leaves) == 340
    assert {"control_model.input_hint_block.14.weight", "control_model.zero_convs.11.0.bias"} <= table
    assert sum(np.prod(x.shape) for x in leaves.values()) == 361_279_120


@pytest.mark.full_size
def test_full_size(tmp_path):
    """A control_v11p_sd15_*.pth as it is published, read and followed."""
    hint = (16, 32, 96, 256)
    control, theirs = live(SD1, 7, hint), enliven(unet(SD1), 0)
    state = {name: torch.from_numpy(np.array(x)) for name, x in original(control, SD1, hint).items()}
    torch.save(state, tmp_path / "control.pth")
    found = controlnet.read(tmp_path / "control.pth", SD1, pipeline.control_shapes)
    leaves = native.flatten({"unet": pipeline.shapes(SD1)["unet"]})
    tensors = {f"unet.{name}": x.numpy() for name, x in theirs.state_dict().items()}
    params = native.unflatten(weights.assemble(tmp_path, tensors, names.folder(SD1, leaves), leaves))["unet"]
    check(control, theirs, found, params, SD1, (64, 64), hint, batch=1)
