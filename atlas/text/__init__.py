"""Training of the atlas's sentence encoder: wordings of questions, pairs of questions and paragraphs, the network."""
