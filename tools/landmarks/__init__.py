"""How the built-in model, nnsight-go/landmarks, comes to be.

`text` says what there is to know and writes it as sentences, `vocabulary` trains the tokenizer, `training` the
weights, `measuring` asks the saved model everything it should know, and `card` writes the answers down.
`tools/train_landmarks.py` runs them in that order. Nothing here is part of the installed package.
"""
