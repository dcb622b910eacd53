"""A model: its configuration, its weights, and its parts as functions."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sdjax import arguments, checkpoints, compilation_cache, samplers, transformed
from sdjax.models import low_rank, tiled
from sdjax.models.config import Config
from sdjax.models.layers import apply
from sdjax.models.prepared import Known, prepare, prepared_shapes
from sdjax.models.shapes import control_shapes, shapes, tiny_decoder_shapes
from sdjax.models.text_encoder import TextEncoder
from sdjax.models.tiny_decoder import TinyDecoder
from sdjax.models.unet import UNet
from sdjax.models.vae import VAE
from sdjax.placement import combined, digest, everywhere, placed
from sdjax.schedule import Schedule
from sdjax.tokenizer import Tokenizer

Params = Any


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _encode_text(config: Config, dtype: str, params: Params, token_ids: jax.Array, clip_skip: int) -> jax.Array:
    encoder = TextEncoder(config.text_encoder, jnp.dtype(dtype))
    return apply(encoder, params["text_encoder"], token_ids, clip_skip).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _unet(config: Config, dtype: str, params: Params, *arguments: jax.Array | None) -> jax.Array:
    return apply(UNet(config.unet, jnp.dtype(dtype)), params["unet"], *arguments)


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def _vae(config: Config, dtype: str, params: Params, method: str, x: jax.Array) -> Any:
    return apply(VAE(config.vae, jnp.dtype(dtype)), params["vae"], x, method=method)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def _vae_tiled(config: Config, dtype: str, params: Params, z: jax.Array, tile: int) -> jax.Array:
    return tiled.decode(config.vae, jnp.dtype(dtype), params["vae"], z, tile)


@functools.partial(jax.jit, static_argnums=0)
def _tiny(dtype: str, params: Params, latents: jax.Array) -> jax.Array:
    return apply(TinyDecoder(jnp.dtype(dtype)), params, latents)


class Lora(NamedTuple):
    """One that a model has beside its weights."""

    name: str
    digest: str
    weight: float


class Net(NamedTuple):
    """A ControlNet, or a TAESD, that a model has beside it."""

    digest: str
    params: Params


class Embedding(NamedTuple):
    """A textual inversion that a model has."""

    word: str
    digest: str


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
    """A model: its configuration, its weights, and its parts as functions. All arrays are channels-last.

    Attributes:
      config: the sizes, the noise schedule's numbers and the prediction type.
      params: a dict of `text_encoder`, `unet` and `vae`, each a nested dict of arrays.
      tokenizer: texts -> token ids.
      dtype: of computation, "float32" or "bfloat16".
      file: the name of what the model was loaded from.
      digest: of samples of its weights as they are computed with.
      loras: what `with_lora` added, in this order.
      embeddings: what `with_embedding` added.
      tiny_decoder: TAESD, where `with_tiny_decoder` added it.
      controls: the ControlNets that `with_controlnet` added, by name.
    """

    config: Config
    params: Params
    tokenizer: Tokenizer
    dtype: str
    file: str
    digest: str
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    tiny_decoder: Net | None = None
    controls: Mapping[str, Net] = dataclasses.field(default_factory=dict)
    _transformed: Known = dataclasses.field(default_factory=dict, repr=False)  # shared by models of the same kernels
    _kept: Path | None = dataclasses.field(default=None, repr=False)  # where these are or would be on the disk

    @functools.cached_property
    def prepared(self) -> Params:
        """`params` as this platform's fastest programs take them; made at the first use, and kept.

        What they compute differs from `params`' by rounding alone.
        """
        return {part: self._only(part)[part] for part in self.params}

    def keep_prepared(self) -> Path | None:
        """Writes what `prepared` transforms to the cache's folder, where processes that load the same file then map it.

        A large model starts in a fraction of the time, and processes share the memory. ControlNets' is not kept.

        Returns:
          The file; None where nothing is transformed, as of a small model, or where it is not for a CPU.

        Raises:
          ValueError: the cache is switched off; or the model is not as it was loaded from one file.
          OSError: it could not be written.
        """
        if compilation_cache.location() is None:
            raise ValueError("SDJAX_CACHE: the cache is switched off, so the weights would be kept nowhere")
        if self._kept is None:
            raise ValueError(
                "weights: they are kept of a model out of one file, without another part and with no LoRA merged; write"
                " this one to a file first (sdjax convert, sdjax.checkpoints.save)"
            )
        if jax.default_backend() != "cpu":
            return None
        if self._kept.is_file():
            return self._kept
        for part in self.params:
            self._only(part)  # after which they are in `_transformed`
        if not self._transformed:
            return None
        transformed.write(self._kept, self.params, self._transformed)
        return self._kept

    @functools.cached_property
    def prepared_controls(self) -> Params:
        """Likewise, by their names, the parameters of the ControlNets."""
        return {name: self._fast(net.params) for name, net in self.controls.items()}

    @functools.cached_property
    def prepared_shapes(self) -> Params:
        """`prepared` before it is made: shapes of what will be transformed, the other arrays themselves."""
        return {part: self._fast_shapes(params) for part, params in self.params.items()}

    @functools.cached_property
    def prepared_control_shapes(self) -> Params:
        """Likewise of `prepared_controls`."""
        return {name: self._fast_shapes(net.params) for name, net in self.controls.items()}

    @property
    def is_prepared(self) -> bool:
        """Whether `prepared` is there already."""
        return "prepared" in vars(self)

    def _only(self, part: str) -> Params:
        """One part of `prepared`: who decodes does not wait for the UNet's kernels. What is made is kept for all."""
        if part not in self._parts:
            self._parts[part] = self._fast(self.params[part])
        return {part: self._parts[part]}

    @functools.cached_property
    def _parts(self) -> dict[str, Params]:
        return {}

    def _fast(self, params: Params) -> Params:
        return prepare(params, self.dtype, self._transformed) if jax.default_backend() == "cpu" else params

    def _fast_shapes(self, params: Params) -> Params:
        return prepared_shapes(params, self.dtype) if jax.default_backend() == "cpu" else params

    @property
    def source(self) -> str:
        """What the model was made of, for recipes."""
        loras = (f"{lora.name}:{lora.weight:g}" for lora in self.loras)
        return " + ".join([self.file, *loras, *(embedding.word for embedding in self.embeddings)])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits; another model has others."""
        if not (self.loras or self.embeddings):
            return self.digest
        loras = (f"{lora.digest}:{lora.weight!r}" for lora in self.loras)
        return combined(self.digest, *loras, *(f"{word}:{own}" for word, own in self.embeddings))

    def with_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None) -> StableDiffusion:
        """The same model with a LoRA beside its weights: kohya's, diffusers' or PEFT's file for this kind of model.

        It is computed along with every product, so that its weight stays an argument of the program: `with_lora_weight`
        compiles nothing. `with_loras_merged` makes it cost nothing instead.

        Args:
          path: of the file.
          weight: factor of what it changes; any number, 1 is what it was trained for.
          name: to call it by; None takes the file's, without its ending.

        Raises:
          ValueError: the weight is no finite number; there is a LoRA of this name.
          CheckpointError: it is no such file, or not for this model; nothing of it is taken then.
        """
        path = Path(path)
        name = path.stem if name is None else name
        weight = _weight(weight)
        if name in (lora.name for lora in self.loras):
            raise ValueError(f"name: there is a LoRA {name!r} already; give this one another")
        leaves = checkpoints.flatten(shapes(self.config))
        changes = checkpoints.lora.read(path, self.config, leaves)
        # By its place and not by its name, so that another LoRA of the same shapes runs the same program.
        params = low_rank.attach(self.params, str(len(self.loras)), changes, weight)
        lora = Lora(name, digest(changes), weight)
        return dataclasses.replace(self, params=params, loras=(*self.loras, lora))

    def with_lora_weight(self, name: str, weight: float) -> StableDiffusion:
        """The same model with another weight for one of its LoRAs. Raises ValueError where there is none so called."""
        weight, known = _weight(weight), [lora.name for lora in self.loras]
        if name not in known:
            raise ValueError(f"name: there is no LoRA {name!r}; there are {', '.join(known) or 'none'}")
        place = known.index(name)
        params = low_rank.weigh(self.params, str(place), weight)
        changed = self.loras[place]._replace(weight=weight)
        return dataclasses.replace(self, params=params, loras=(*self.loras[:place], changed, *self.loras[place + 1 :]))

    def with_loras_merged(self) -> StableDiffusion:
        """The same model with its LoRAs added into its weights: as fast as without, and no longer to be weighed."""
        bare = dataclasses.replace(self, embeddings=())
        return dataclasses.replace(
            self,
            params=low_rank.fold(self.params),
            file=bare.source,
            digest=bare.fingerprint,
            loras=(),
            _transformed={},
            _kept=None,
        )

    def with_embedding(self, path: str | Path, word: str | None = None) -> StableDiffusion:
        """The same model with a textual inversion: a word that its prompts may use, of one or several tokens.

        Args:
          path: of the web UI's `.pt` or `.safetensors`, or of diffusers' `.bin` or `.safetensors`.
          word: what stands for it in prompts, in any case; None takes what the file says, or its name.

        Raises:
          ValueError: the word is empty, has white space or brackets in it, or the model has it already.
          CheckpointError: it is no such file, or its vectors are for another model.
        """
        own, vectors = checkpoints.textual_inversion.read(Path(path), self.config.text_encoder.width)
        word = own if word is None else word
        if not re.fullmatch(r"[^\s()\[\]|:,]+", word):
            raise ValueError(f"word: expected one without white space, brackets, colons and commas, got {word!r}")
        if word.casefold() in {known.casefold() for known, _ in self.tokenizer.words}:
            raise ValueError(f"word: the model has {word!r} already; choose another")
        table = self.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"]
        first = len(table)
        ids = tuple(range(first, first + len(vectors)))
        table = jnp.concatenate([table, jnp.asarray(vectors, table.dtype)])
        text_encoder = dict(self.params["text_encoder"])
        text_encoder["embeddings"] = {**text_encoder["embeddings"], "token_embedding": {"embedding": table}}
        return dataclasses.replace(
            self,
            config=dataclasses.replace(
                self.config, text_encoder=dataclasses.replace(self.config.text_encoder, vocab_size=len(table))
            ),
            params={**self.params, "text_encoder": text_encoder},
            tokenizer=dataclasses.replace(self.tokenizer, words=(*self.tokenizer.words, (word, ids))),
            embeddings=(*self.embeddings, Embedding(word, digest(vectors))),
        )

    def with_part(self, path: str | Path, part: str | None = None) -> StableDiffusion:
        """The same model with another autoencoder (`vae-ft-mse-840000`), UNet or text encoder.

        Args:
          path: of the part's own file or diffusers folder, or of a whole checkpoint of the same kind of model.
          part: "vae", "unet" or "text_encoder"; None takes the one that is there.

        Raises:
          ValueError: the part is another; or what was added to the model is in the old part, or does not fit the new.
          CheckpointError: it is no such part for this model, or it has several and none is chosen.
        """
        if part not in (None, *checkpoints.parts.CALLED):
            raise ValueError(f"part: expected one of {', '.join(checkpoints.parts.CALLED)}, got {part!r}")
        path = Path(path)
        part, config, found = checkpoints.parts.read(path, part, self.config, shapes)
        if (self.loras and part != "vae") or (self.embeddings and part == "text_encoder"):
            raise ValueError(f"part: the model's LoRAs or textual inversions are in its {part}; add them after it")
        if (self.controls and config.unet != self.config.unet) or (
            (self.controls or self.tiny_decoder is not None) and config.vae.factor != self.config.vae.factor
        ):
            raise ValueError(f"part: the model's ControlNets or TAESD do not fit this {part}; add theirs after it")
        own, params = placed(path, found, self.dtype)
        stay = [params for name, params in self.params.items() if name != part]
        kernels = {id(leaf) for leaf in jax.tree.leaves([stay, [net.params for net in self.controls.values()]])}
        return dataclasses.replace(
            self,
            config=config,
            params={**self.params, part: params},
            # Without the old part's, which would live as long as the new model.
            _transformed={kernel: known for kernel, known in self._transformed.items() if kernel in kernels},
            tokenizer=Tokenizer(config.text_encoder.padding_id, self.tokenizer.words),
            file=f"{self.file} + {path.name}",
            digest=combined(self.digest, part, own),
            _kept=None,
        )

    def with_controlnet(self, path: str | Path, name: str | None = None) -> StableDiffusion:
        """The same model with a ControlNet 1.x, which `generate(controls={name: sdjax.Control(picture)})` follows.

        Args:
          path: of a file with the original names (`control_model.`, alone or in a whole checkpoint) or diffusers', or
            of a diffusers folder.
          name: to call it by; None takes the path's, without its ending.

        Raises:
          ValueError: there is a ControlNet of this name.
          CheckpointError: it is no such file, or not for this model.
        """
        path = Path(path)
        name = path.stem if name is None else name
        if name in self.controls:
            raise ValueError(f"name: there is a ControlNet {name!r} already; give this one another")
        found = checkpoints.controlnet.read(path, self.config, control_shapes)
        return dataclasses.replace(self, controls={**self.controls, name: Net(*placed(path, found, self.dtype))})

    def with_tiny_decoder(self, path: str | Path) -> StableDiffusion:
        """The same model with TAESD's decoder, for `preview` and `Fast.tiny_vae`.

        Args:
          path: of `taesd_decoder.safetensors` or `.pth`, or of diffusers' AutoencoderTiny, file or folder.

        Raises:
          CheckpointError: it is no such file; or the model has latents of another kind.
        """
        if (self.config.vae.latent_channels, self.config.vae.factor) != (4, 8):
            raise checkpoints.CheckpointError(
                f"{path}: TAESD is for latents of 4 channels, an eighth of the picture's size"
            )
        found = checkpoints.tiny_decoder.read(Path(path), checkpoints.flatten(tiny_decoder_shapes()))
        return dataclasses.replace(self, tiny_decoder=Net(*placed(path, found, self.dtype)))

    def preview(self, latents: jax.Array) -> np.ndarray:
        """What a callback's latents (B, h, w, z) look like: (B, H, W, 3) uint8; by TAESD where the model has it."""
        if self.tiny_decoder is None:
            pictures = self.decode_latents(latents / self.config.vae.scaling_factor)
        else:
            pictures = _tiny(self.dtype, self.tiny_decoder.params, latents)
        return np.clip(np.rint(np.asarray(pictures) * 127.5 + 127.5), 0, 255).astype(np.uint8)

    def place(self, mesh: jax.sharding.Mesh) -> StableDiffusion:
        """The same model with its weights on every device of the mesh; `generate(mesh=)` then has nothing to move."""
        controls = {name: net._replace(params=everywhere(net.params, mesh)) for name, net in self.controls.items()}
        params = everywhere(self.params, mesh)
        return dataclasses.replace(self, params=params, controls=controls, _transformed={})

    def encode_text(self, token_ids: jax.typing.ArrayLike, clip_skip: int = 0) -> jax.Array:
        """(B, 77) int32 -> (B, 77, D) float32, after the final layer norm.

        clip_skip: how many of the encoder's last layers are left out.
        """
        return _encode_text(self.config, self.dtype, self.params, np.asarray(token_ids, np.int32), clip_skip)

    def unet(
        self,
        latents: jax.Array,
        timesteps: jax.typing.ArrayLike,
        context: jax.Array,
        key_mask: jax.Array | None = None,
    ) -> jax.Array:
        """(B, h, w, Cin), (B,) or (), (B, S, D) -> the raw model output (B, h, w, z), float32.

        timesteps: of training, which may be fractional.
        key_mask: (B, S) bool, False for tokens of the context that do not count.
        """
        timesteps = jnp.broadcast_to(jnp.asarray(timesteps, jnp.float32), latents.shape[:1])
        return _unet(self.config, self.dtype, self._only("unet"), latents, timesteps, context, key_mask)

    def encode_image(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(B, H, W, 3) in [-1, 1] -> mean and log-variance (B, h, w, z), before the scaling factor.

        The log-variance is clamped to [-30, 20].
        """
        return _vae(self.config, self.dtype, self._only("vae"), "encode", images)

    def decode_latents(self, z: jax.Array, tile: int | None = None) -> jax.Array:
        """(B, h, w, z) latents before the scaling factor -> (B, H, W, 3), about [-1, 1], unclipped.

        tile: pixels, to decode one picture at a time and each in tiles of this side (`sdjax.models.tiled`).
        """
        if tile is not None:
            tile = arguments.tile("tile", tile, self.config)
            return _vae_tiled(self.config, self.dtype, self._only("vae"), z, tile)
        return _vae(self.config, self.dtype, self._only("vae"), "decode", z)

    def save(self, path: str | Path) -> None:
        """Writes config and weights, LoRAs merged, as one native safetensors file, whole or not at all.

        Raises:
          ValueError: the model has textual inversions: the format has no words, and their files remain; or its weights
            hold NaN or infinity.
        """
        if self.embeddings:
            words = ", ".join(embedding.word for embedding in self.embeddings)
            raise ValueError(f"a model file has no words of textual inversions ({words}); save the model without them")
        checkpoints.save(path, low_rank.fold(self.params), self.config, targets=shapes(self.config))

    def schedule(self) -> Schedule:
        """The noise schedule that the model was trained with."""
        config = self.config
        return Schedule(
            config.num_train_timesteps,
            config.beta_start,
            config.beta_end,
            config.beta_schedule,
            config.zero_terminal_snr,
        )

    def sampler(self, name: str | samplers.Algorithm = "ddpm", **options: Any) -> samplers.Sampler:
        """`samplers.create` for this model, as its checkpoint says: the schedule, the prediction type, the offset, the
        spacing where the sampler has diffusers' own, and where DDIM ends. Options override them."""
        config = self.config
        algorithm = name if isinstance(name, samplers.Algorithm) else samplers.find(name)
        own: dict[str, Any] = {
            "schedule": self.schedule(),
            "prediction": config.prediction,
            "steps_offset": config.steps_offset,
        }
        if algorithm.spacing in ("leading", "linspace", "trailing"):
            there = [spacing for spacing, _ in algorithm.spacings]
            own["spacing"] = next((spacing for spacing in config.spacings if spacing in there), None)
        if "set_alpha_to_one" in algorithm.options:
            own["set_alpha_to_one"] = config.set_alpha_to_one
        return samplers.create(algorithm, **{**own, **options})


def _weight(weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"weight: expected a finite number, got {weight!r}")
    return float(weight)
