"""The suite is stricter than its users: no silent broadcasting between ranks anywhere."""

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
