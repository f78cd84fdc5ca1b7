"""What a study calls its controls and questions in sentences, and where the paper stands on a claim."""

from tl_tomsparse._study_compare import SCENARIOS

PAPER = {
    "tracks_beliefs": "says so of its models",
    "false_belief_falls": "says so",
    "more_than_random": "says so, against one random mask",
    "true_belief_stays": "not reported apart",
    "reality_stays": "not reported apart",
    "perplexity_stays": "says that language understanding suffers",
    "dose": "shows a sweep",
    "diagonal_predicts": "assumes it",
    "key_value_falls": "says that contextual localisation suffers",
    "induction_falls": "says that contextual localisation suffers",
    "prose_stays": "says that language understanding suffers",
}
ASKED = {
    "false_belief": "false beliefs in the stories that are asked about",
    SCENARIOS["transfer"]: "false beliefs in transfer stories",
    SCENARIOS["contents"]: "false beliefs in contents stories",
    "second_order": "second-order beliefs",
}
NAMES = {
    "random_total": "random masks of equal size over all matrices",
    "random_row": "random masks with as many entries at each input channel",
    "random_column": "random masks with as many entries at each output channel",
    "random_pair": "random masks with as many entries at each rotary pair",
    "random_magnitude": "random masks of weights of the same size",
    "random_change": "random masks that change the weights as much",
    "general_only": "the mask of general text alone",
    "lowest": "the mask of the lowest sensitivities",
    "wrong_labels": "a mask made with wrong answers",
    "shuffled_labels": "a mask made with random answers",
    "last_token": "a mask made with the prompt's last token in place of the answer",
    "false_photograph": "the mask of false photographs",
    "key_value": "the mask of key-value recall",
    "counting": "the mask of counting in words",
}
