"""One decoder for the Llama, SmolLM2, Qwen2/2.5/3, Mixtral, Qwen-MoE, OLMoE and DeepSeek-MoE families.

Example:
    import jax, jax.numpy as jnp
    from jaxlab.models.decoder import Decoder, DecoderConfig, init_params

    config = DecoderConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2)
    model = Decoder(config)
    params = init_params(model, jax.random.key(0))
    logits = model.apply({"params": params}, jnp.zeros((1, 8), jnp.int32)).logits
"""

from jaxlab.models.decoder.cache import Cache, KVCache
from jaxlab.models.decoder.config import DecoderConfig, MoESpec, RopeConfig
from jaxlab.models.decoder.mlp import MoEPolicy, default_mlp
from jaxlab.models.decoder.model import Decoder, DecoderOutput, abstract_params, head_weight, init_params

__all__ = [
    "Cache",
    "Decoder",
    "DecoderConfig",
    "DecoderOutput",
    "KVCache",
    "MoEPolicy",
    "MoESpec",
    "RopeConfig",
    "abstract_params",
    "default_mlp",
    "head_weight",
    "init_params",
]
