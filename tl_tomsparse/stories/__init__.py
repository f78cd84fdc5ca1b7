"""Stories whose beliefs are computed: epistemic logic, scenarios, generation. No torch."""
