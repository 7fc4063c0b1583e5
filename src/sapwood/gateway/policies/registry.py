"""Policies by name."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from sapwood.base.registry import Registry
from sapwood.gateway.policies.bucket import Bucket
from sapwood.gateway.policies.cache_aware import CacheAware
from sapwood.gateway.policies.hashing import BoundedLoad, ConsistentHashing, PrefixHash
from sapwood.gateway.policies.interface import Balance, Policy
from sapwood.gateway.policies.known_pages import KnownPages
from sapwood.gateway.policies.manual import Manual
from sapwood.gateway.policies.plain import PowerOfTwo, Random, RoundRobin
from sapwood.gateway.worker import WorkerType
from sapwood.schema.config.gateway import POLICY_PLUGINS, GatewayConfig

Maker = Callable[[GatewayConfig, random.Random, KnownPages | None], Policy]
"""Makes a policy of the configuration, a source of chance, and what workers' caches hold (None:
their events are not followed)."""

_MADE_BY: Mapping[str, Maker] = {
    "random": lambda config, rng, known: Random(rng),
    "round_robin": lambda config, rng, known: RoundRobin(),
    "power_of_two": lambda config, rng, known: PowerOfTwo(rng),
    "cache_aware": lambda config, rng, known: CacheAware(
        threshold=config.cache_threshold,
        balance=_balance(config),
        max_tree_bytes=config.max_tree_size,
        known=known,
    ),
    "prefix_hash": lambda config, rng, known: PrefixHash(
        num_tokens=config.prefix_token_count, load_factor=config.prefix_hash_load_factor
    ),
    "consistent_hashing": lambda config, rng, known: ConsistentHashing(rng),
    "bounded_load": lambda config, rng, known: BoundedLoad(
        num_tokens=config.prefix_token_count, load_factor=config.prefix_hash_load_factor
    ),
    "manual": lambda config, rng, known: Manual(
        mode=config.assignment_mode, max_idle_s=config.max_idle_secs, rng=rng
    ),
    "bucket": lambda config, rng, known: Bucket(
        interval_s=config.bucket_adjust_interval_secs, balance=_balance(config)
    ),
}
_PLUGINS = Registry[Maker]("policy", {}, entry_point=POLICY_PLUGINS)


def make_policy(
    config: GatewayConfig, rng: random.Random, known: KnownPages | None = None
) -> Policy:
    """The policy of the configuration's name."""
    made_by = _MADE_BY.get(config.policy) or _PLUGINS.get(config.policy)
    return made_by(config, rng, known)


def make_policies(
    config: GatewayConfig, rng: random.Random, known: KnownPages | None = None
) -> dict[WorkerType, Policy]:
    """One policy for each type of workers that the gateway has.

    known  what workers' caches hold; None: their events are not followed
    """
    return {
        kind: make_policy(replace(config, policy=name), rng, known)
        for kind, name in policy_names(config).items()
    }


def policy_names(config: GatewayConfig) -> dict[WorkerType, str]:
    if not config.pd_disaggregation:
        return {"regular": config.policy}
    return {
        "prefill": config.prefill_policy or config.policy,
        "decode": config.decode_policy or config.policy,
    }


def _balance(config: GatewayConfig) -> Balance:
    return Balance(
        abs_threshold=config.balance_abs_threshold, rel_threshold=config.balance_rel_threshold
    )
