"""Numbers about tracks: how good they are against ground truth, and what is wrong with them.

    files -> match (video, category) by (video, category) -> `Matches` -> curves -> averages

`protocol` holds what the official evaluators fix; `average_precision` matches, `compiled` does the
same natively from the files' bytes; `matches` is what remains of an evaluation: everything after it
(`curves`, `tables`, `errors`, `compare`, `partial`) is a function of its columns alone, so subsets,
shards and comparisons never compute an IoU again. `hota` and `region_boundary` are other measures.
"""
