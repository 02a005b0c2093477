"""The families rondel knows: an explicit list. Adding one is a table, a tiny model in the tests and a README row."""

from rondel.converters.families.deepseek import DEEPSEEK2
from rondel.converters.families.llama import LLAMA
from rondel.converters.families.qwen import QWEN2, QWEN3, QWEN3MOE
from rondel.converters.family import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, QWEN2, QWEN3, QWEN3MOE, DEEPSEEK2)}
