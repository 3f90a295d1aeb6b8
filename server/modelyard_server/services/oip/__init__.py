"""The Open Inference Protocol, version 2: another language for the same requests.

messages      the protocol's messages, from descriptors of our own
datatypes     its names for element types
contents      tensors of its messages to tensors inside, and back
requests      a ModelInferRequest to what is asked
infer         ModelInfer and ModelStreamInfer
meanings      what a name stands for: the models behind a key
signatures    what models take and give, as far as that is known before they run
models        ModelReady, ModelMetadata and ModelConfig
statistics    ModelStatistics
repository    RepositoryIndex, RepositoryModelLoad and RepositoryModelUnload
service       the server's own methods, and all of them as handlers
"""
