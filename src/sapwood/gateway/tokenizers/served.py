"""The tokenizers of one gateway as its application uses them."""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.gateway.exchange import Proxy
from sapwood.gateway.fleet import Fleet
from sapwood.gateway.tokenizers.brought import BroughtParts
from sapwood.gateway.tokenizers.cache import CacheCounts, CacheLimits
from sapwood.gateway.tokenizers.prompts import PromptIds
from sapwood.gateway.tokenizers.registry import Tokenizers
from sapwood.gateway.tokenizers.routes import token_handlers, tokenizers_dialect
from sapwood.http.endpoints import Dialect, Handler
from sapwood.schema.config.gateway_tokenizing import TokenizingConfig


class ServedTokenizers:
    """The registry, with the tokenizer that the options name, and its routes.

    brought  what workers bring into it

    Raises ModelSourceError or ConfigError if that tokenizer cannot be loaded
    """

    def __init__(self, config: TokenizingConfig) -> None:
        self.registry = Tokenizers(
            CacheLimits(
                max_texts=config.tokenizer_cache_enable_l0 * config.tokenizer_cache_l0_max_entries,
                max_piece_bytes=(
                    config.tokenizer_cache_enable_l1 * config.tokenizer_cache_l1_max_memory
                ),
            )
        )
        self.brought = BroughtParts(self.registry)
        if config.tokenizer_source is not None:
            name = config.model_path or config.tokenizer_source
            self.registry.load_default(name, config.tokenizer_source, config.chat_template)

    @property
    def dialect(self) -> Dialect:
        return tokenizers_dialect(self.registry)

    def prompts(self, fleet: Fleet) -> PromptIds:
        return PromptIds(self.registry, fleet)

    def handlers(self, proxy: Proxy) -> Mapping[str, Handler]:
        return token_handlers(self.registry, proxy)

    @property
    def counts(self) -> Mapping[str, CacheCounts]:
        return self.registry.counts

    @property
    def num_bytes(self) -> Mapping[str, int]:
        return self.registry.num_bytes

    async def close(self) -> None:
        await self.registry.close()
