"""Text: requests in, a stream of events out.

`engine`    TextEngine: slots, batching, detokenising, stop strings; knows no decoder from the inside
`events`    what a decoder hands to the engine (Chunk) and what the engine hands to the user (Event)
`requests`  Request, JSONL in and out
`decoders`  the decoders behind the engine; autoregressive here
`cli`       `python -m infer text`
"""
