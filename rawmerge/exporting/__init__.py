"""Other tools' merge files: LLaMA-Factory's, axolotl's and mergekit's, as merges by rawmerge."""
