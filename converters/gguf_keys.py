"""The names of every key that rondel writes to a GGUF file, and the constants of the container."""

MAGIC = b"GGUF"
VERSION = 3
QUANTIZATION_VERSION = 2  # of ggml's block formats
ALIGNMENT = 32  # llama.cpp's default
EXTENDED_ALIGNMENT = 64  # files with extended tensors: one cache line a tile (formats.md, section 2)


class General:
    """What the file is."""

    ARCHITECTURE = "general.architecture"
    TYPE = "general.type"
    NAME = "general.name"
    BASENAME = "general.basename"
    FINETUNE = "general.finetune"
    VERSION = "general.version"
    SIZE_LABEL = "general.size_label"
    LICENSE = "general.license"
    FILE_TYPE = "general.file_type"
    QUANTIZATION_VERSION = "general.quantization_version"
    ALIGNMENT = "general.alignment"


class Model:
    """Hyperparameters, behind the architecture's name and a dot."""

    BLOCK_COUNT = "block_count"
    CONTEXT_LENGTH = "context_length"
    EMBEDDING_LENGTH = "embedding_length"
    FEED_FORWARD_LENGTH = "feed_forward_length"
    VOCAB_SIZE = "vocab_size"
    HEAD_COUNT = "attention.head_count"
    HEAD_COUNT_KV = "attention.head_count_kv"
    KEY_LENGTH = "attention.key_length"
    VALUE_LENGTH = "attention.value_length"
    LAYER_NORM_RMS_EPSILON = "attention.layer_norm_rms_epsilon"
    ROPE_DIMENSION_COUNT = "rope.dimension_count"
    ROPE_FREQ_BASE = "rope.freq_base"
    ROPE_SCALING_TYPE = "rope.scaling.type"
    ROPE_SCALING_FACTOR = "rope.scaling.factor"


class Tokenizer:
    """The vocabulary and how text becomes tokens."""

    MODEL = "tokenizer.ggml.model"  # "gpt2" (byte-level BPE) or "llama" (SentencePiece)
    PRE = "tokenizer.ggml.pre"
    TOKENS = "tokenizer.ggml.tokens"
    SCORES = "tokenizer.ggml.scores"
    TOKEN_TYPE = "tokenizer.ggml.token_type"
    MERGES = "tokenizer.ggml.merges"
    BOS = "tokenizer.ggml.bos_token_id"
    EOS = "tokenizer.ggml.eos_token_id"
    EOT = "tokenizer.ggml.eot_token_id"
    UNKNOWN = "tokenizer.ggml.unknown_token_id"
    SEPARATOR = "tokenizer.ggml.seperator_token_id"  # spelled so in the format
    PADDING = "tokenizer.ggml.padding_token_id"
    CLS = "tokenizer.ggml.cls_token_id"
    MASK = "tokenizer.ggml.mask_token_id"
    ADD_BOS = "tokenizer.ggml.add_bos_token"
    ADD_EOS = "tokenizer.ggml.add_eos_token"
    ADD_SEP = "tokenizer.ggml.add_sep_token"
    ADD_SPACE_PREFIX = "tokenizer.ggml.add_space_prefix"
    CHAT_TEMPLATE = "tokenizer.chat_template"
    CHAT_TEMPLATE_NAMED = "tokenizer.chat_template.{name}"
    CHAT_TEMPLATES = "tokenizer.chat_templates"


class TokenType:
    """The values of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Split:
    """One model in several files."""

    NUMBER = "split.no"
    COUNT = "split.count"
    TENSORS = "split.tensors.count"


class Imatrix:
    """llama.cpp's importance matrix file."""

    TYPE = "imatrix"  # the value of general.type
    DATASETS = "imatrix.datasets"
    CHUNK_COUNT = "imatrix.chunk_count"
    CHUNK_SIZE = "imatrix.chunk_size"
    SUMS = ".in_sum2"  # tensor suffixes
    COUNTS = ".counts"


class Adapter:
    """llama.cpp's LoRA file."""

    TYPE_VALUE = "adapter"  # the value of general.type
    TYPE = "adapter.type"
    LORA = "lora"  # its value
    ALPHA = "adapter.lora.alpha"
    A = ".lora_a"  # tensor suffixes: what is read (rank, cols), and what is added (rows, rank)
    B = ".lora_b"


class Rondel:
    """What this project adds (formats.md)."""

    ARCHITECTURE = "rondel"  # the value of general.architecture where llama.cpp must refuse the file
    PREFIX = "rondel."
    BASE_ARCHITECTURE = "rondel.architecture"
    VERSION = "rondel.version"
    REQUIRES = "rondel.requires"
    TENSOR_NAME = "rondel.tensor.name"
    TENSOR_FORMAT = "rondel.tensor.format"
    TENSOR_SHAPE = "rondel.tensor.shape"
    TENSOR_SHA256 = "rondel.tensor.sha256"  # one hexadecimal string: 16 or 64 digits a tensor, in their order
    EXPORT_SHA256 = "rondel.export.sha256"  # of the inputs and settings that made the file
    SOURCE_NAME = "rondel.source.name"
    SOURCE_SHA256 = "rondel.source.sha256"
    CALIBRATION_SHA256 = "rondel.calibration.sha256"
    CALIBRATION_TOKENS = "rondel.calibration.tokens"
    RECIPE = "rondel.recipe"
    REPLICATION = "rondel.replication."
    ROTATION_COUNT = "rondel.rotation.count"
    BASIS = "rondel.rotation.sha256"  # of an imatrix file: hash of the rotations behind which it was measured
    ROTATION = "rondel.rotation.{index}.{field}"


FORMAT_VERSION = (1, 0, 0)  # of rondel's extension, the value of rondel.version


def model_key(architecture: str, name: str) -> str:
    """A hyperparameter's full key."""
    return f"{architecture}.{name}"
