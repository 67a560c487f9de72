"""State of a stream: keys and values of earlier tokens in buffers of fixed shape."""

from jaxmodels.cache.kv import KV, Cache, CacheRows, Codes, KVCache, KVCodes, Scales, SinkRingCache

__all__ = ["KV", "Cache", "CacheRows", "Codes", "KVCache", "KVCodes", "Scales", "SinkRingCache"]
