"""Runtime "transformers": models in the folder format of the transformers library.

`runtime` is the only module that may be imported without torch; it imports the others when needed.

    runtime       options, price, load: what the server calls
    architectures which class of the library serves a task
    skeletons     what a model is made of, before its weights are read
    loading       modules: by the library once, and then by a template of that
    tokenizing    tokenizer.json, and batches of token ids
    model         what all loaded models share
    text, generation, image   the tasks
"""
