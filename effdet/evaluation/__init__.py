"""Pascal VOC's metric on plain arrays, under effdet's names; `evaluator.PascalEvaluator` evaluates a data set."""
