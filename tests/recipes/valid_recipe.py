"""A recipe that validates, as text; `OUTPUT` stands for a folder."""

VALID = """\
model: {name: pocket}
task: sft
data:
  train: pocket/word-problems
adapter:
  method: pissa
  r: 16
  target_modules: all-linear
training:
  learning_rate: 1.0e-3
  max_steps: 2
evaluation:
  tasks: [pocket/word-problems]
output:
  dir: OUTPUT
"""
