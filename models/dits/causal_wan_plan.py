"""Loader of the causal Wan DiT, which has the parallel plan of the Wan DiT."""

from __future__ import annotations

from configs.models.dits.causal_wan import CausalWanTransformerConfig
from models.dits.causal_wan import CausalWanTransformer3DModel
from models.dits.loading import TransformerLoader
from models.dits.wan import FLOAT32_PARAMETERS, UNUSED_PARAMETERS
from models.dits.wan_plan import WAN_PLAN

load_causal_wan_transformer = TransformerLoader(
    config=CausalWanTransformerConfig,
    build=CausalWanTransformer3DModel,
    plan=WAN_PLAN,
    heads=lambda config: config.num_attention_heads,
    feed_forward=lambda config: config.ffn_dim,
    keep_float32=FLOAT32_PARAMETERS,
    unused=UNUSED_PARAMETERS,
    own_entries=CausalWanTransformerConfig.own_entries,
)
