"""The gradient of what comes out with respect to the noise that went in: `python examples/gradient_through_sampling.py`

Sampling is a pure function, so `jax.grad` goes through all of it: here it turns the start noise, a little at a time,
until the picture is darker. The same works with any differentiable loss, and for the sampler's rows or the prompt's
embedding in place of the noise.
"""

import jax
import jax.numpy as jnp
import numpy as np

import sdjax

STEPS, UPDATES, RATE = 6, 4, 0.05


def main() -> list[float]:
    model = sdjax.load()
    context = model.encode_text(model.tokenizer(["a 3d emoji of a red apple on a white background"]))
    config = model.config
    rows = model.sampler("ddim").rows(STEPS)

    def brightness(noise: jax.Array) -> jax.Array:
        def denoise(x: jax.Array, time: jax.Array) -> jax.Array:
            return model.unet(x, time, context)

        latents = sdjax.samplers.sample(denoise, noise, rows)
        return model.decode_latents(latents / config.vae.scaling_factor).mean()

    value_and_gradient = jax.jit(jax.value_and_grad(brightness))
    size = config.image_size // config.vae.factor
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(1, size, size, config.vae.latent_channels)), jnp.float32)
    radius = jnp.linalg.norm(noise)
    values = []
    for _ in range(UPDATES):
        value, gradient = value_and_gradient(noise)
        values.append(float(value))
        noise = noise - RATE * radius * gradient / jnp.linalg.norm(gradient)
        noise = noise * radius / jnp.linalg.norm(noise)  # noise of another length is nothing the model has seen
    return values


if __name__ == "__main__":
    print("mean pixel, -1 black to 1 white:", " ".join(f"{value:.3f}" for value in main()))
