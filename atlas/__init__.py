"""Generate the atlas, the demo bundle in `gog_edge/data/atlas`: its pack, encoder, policy, samples and test sets.

It imports gog_edge and is imported by nothing in it. README.md describes each stage.
"""
