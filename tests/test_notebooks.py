"""Every notebook runs from top to bottom, headlessly, at the quick budget, with the network off, and finds what it claims."""
from statistics import mean

import pytest
from nbformat.v4 import new_code_cell, new_notebook
import nbformat

from bigmodel_nb.headless import kernel
from bigmodel_nb.headless.parameters import catalogue
from bigmodel_nb.headless.run import run


def accuracy(metric) -> float:
    return metric["value"] if isinstance(metric, dict) else metric


# What each notebook must find, as conditions on its recorded metrics. Bounds are those of the text, not of one machine.
EXPECTED = {
    "kit/record": lambda m: abs(m["pi"] - 3.14159) < 0.2,
    "kit/plots": lambda m: m["lowest_contrast_of_ink"] > 4.499 and m["nearest_neighbour_accuracy"] > 0.95 and m["spread_largest_difference"] < 1e-3,
    "kit/core": lambda m: m["digits_accuracy"]["low"] > 0.9 and m["largest_difference_from_scipy"] < 1e-12 and m["wilson_lowest_coverage"] > 0.85,
    "kit/exercises": lambda m: m["states"] == ["empty", "wrong", "wrong", "solved"] and m["passed_by_chance"]["five cases"] < 0.01 < m["passed_by_chance"]["one case"]
    and m["equal_to_the_last_digit"] < 0.95 and m["alike"] == 1 and m["disagreements"] == 0,
    "kit/widgets": lambda m: m["forms_without_a_kernel"] == 1 and m["left_open"] == {"careless": 12, "engine": 0}
    and m["graph_difference"] < 1e-12 and m["walk_difference"] < 1e-12 and "allowed are positive numbers" in m["said_of_a_failed_drawing"],
    "data/sources": lambda m: accuracy(m["leaky_accuracy"]) > accuracy(m["honest_accuracy"]) + 0.2 and m["closest_pair_across_split"] < 0.5
    and m["similarity_largest_difference"] < 1e-9 and accuracy(m["wine_accuracy_scaled"]) > accuracy(m["wine_accuracy"]) and m["rows"] >= 800,
    "foundations/losses": lambda m: m["largest_difference_from_torch"] < 1e-12 and m["gradient_difference"] < 1e-8
    and abs(m["first_loss"] - 2.303) < 0.1 and m["softmax_twice_loss"] > m["softmax_twice_floor"]
    and m["largest_slope_error"] < 1e-8 and m["focal_difference"] < 1e-12 and abs(m["gaussian_difference"]) < 1e-12
    and m["mistakes_named"] == m["mistakes_tried"] >= 12 and m["false_alarms"] == 0,
    "foundations/autograd": lambda m: m["operations"] >= 37 and m["largest_gradcheck_error"] < 1e-8 and m["largest_difference_from_torch"] < 1e-13
    and abs(m["slope_through_a_deep_chain"] - 0.9999**10_000) < 1e-12 and list(m["results_alive"].values()) == [200, 1]
    and "element (1, " in m["planted_bug"] and accuracy(m["test_accuracy"]) >= 0.96 and m["largest_difference_of_losses"] < 1e-10
    and max(m["jvp_difference"], m["hvp_difference"], m["checkpoint"]["difference"]) < 1e-12 and m["checkpoint"]["kept"] < 0.5 and m["checkpoint"]["runs"] == 2,
    "foundations/optim": lambda m: m["largest_difference_from_torch"] < 1e-12 and m["closed_form_difference"] < 1e-12 and m["contraction_error"] < 1e-3
    and abs(m["slopes_of_steps"]["gradient descent"] - 1) < 0.1 and all(abs(m["slopes_of_steps"][kind] - 0.5) < 0.1 for kind in ("heavy ball", "Nesterov"))
    and 0.6 < m["newton_schulz_band"][0] < 1 < m["newton_schulz_band"][1] < 1.3 and m["newton_schulz_limit_difference"] < 1e-12
    and m["scale_free_difference"] < 1e-5 and m["schedule_difference"] < 1e-12 and m["clip_difference"] < 1e-12 and m["noise_difference"] < 1e-5
    and abs(m["variance_slope"] + 1) < 0.05 and m["variance_largest_deviation"] < 0.3 and m["weights_after_decay"]["penalty"][0] > 0.7
    and m["weights_after_decay"]["penalty"][1] < 0.05 and all(abs(weight - m["weights_after_decay"]["due"]) < 0.1 for weight in m["weights_after_decay"]["decoupled"])
    and m["test_accuracy"]["Adam"] > 0.94 and m["test_accuracy"]["Muon, AdamW"] > 0.94 and m["test_accuracy"]["Adam"] > m["test_accuracy"]["gradient descent"] + 0.05,
    "foundations/reading": lambda m: m["right_accuracy"] > 0.95 and accuracy(m["script_accuracy"]) > 0.95
    and max(m[f"accuracy_{name}"] for name in ("own_answers", "without_input", "of_old_optimizer")) < 0.2
    and m["loss_own_answers"] < 1e-3 and m["loss_of_wrong_sign"] < -1e3 and m["accuracy_of_wrong_sign"] < 0.6
    and m["thousand_classes"]["binary"]["loss"] < 0.02 and m["thousand_classes"]["cross-entropy"]["accuracy"] > 10 * m["thousand_classes"]["binary"]["accuracy"]
    and m["softmax_twice_loss"] > m["softmax_twice_floor"] and m["softmax_twice_times_slower"] > 3
    and m["accuracy_of_regression"] < 0.5 and m["eval_gain"] > 0.2 and len(m["mistakes_named"]) == 4,
    "models/vision": lambda m: accuracy(m["test_accuracy"]) > 0.96 > accuracy(m["linear_accuracy"]) and m["largest_difference_from_torch"] < 1e-10,
    "training/loop": lambda m: accuracy(m["test_accuracy"]) > 0.95 and m["overfitting"] > 1.2 and m["repeats_bit_for_bit"] and m["same_as_tutorial_loop"],
    "adapting/finetune": lambda m: m["accuracy_fine_tuned"]["low"] > 0.5 and m["accuracy_tfidf"]["high"] < 0.8 and m["reloaded_difference"] < 1e-5
    and m["masked_pooling_shift"] < 1e-4 < m["naive_pooling_shift"],
    "robust/attacks": lambda m: m["clean_accuracy"] > 0.95 and min(m["attained_linf"], m["attained_l2"], m["attained_l1"]) > 0.9999
    and 1 <= m["distance_found_to_exact"] < 1.005 and m["one_step_difference"] < 0.02 and m["ensemble_is_the_minimum"]
    and abs(m["distance_of_ours_by_shift"][0] - m["distance_of_ours_by_shift"][1]) < 0.01
    and m["curve"]["accuracy"][-1] < 0.02 and m["masked_reported_by_plain_attack"] > 0.85 and abs(m["masked_reported_by_ours"] - accuracy(m["robust_accuracy_at_0_1"])) < 0.06,
    "robust/training": lambda m: accuracy(m["accuracy_adversarial"]) > 0.93 and max(m["robust_ordinary"]["high"], m["robust_noise"]["high"])
    < min(m[f"robust_{name}"]["low"] for name in ("adversarial", "trades", "mart", "awp", "fast", "free"))
    and max(m["saddle_difference"], m["awp_difference"]) < 1e-12 and m["free_agrees"] and m["trades_slope_at_start"] < 1e-6 and 0.999 < m["trades_attained"] < 1 + 1e-6
    and all(abs(m["cost_counted"][name] / units - 1) < 0.05 for name, units in m["cost_predicted"].items())
    and max(abs(share - derived) for share, derived in zip(m["one_step_attained"], (0.4375, 0.75, 0.859375, 1))) < 0.03
    and m["alarm_at_batch"] and m["collapse"]["one step only"]["high"] < m["collapse"]["cured"]["low"] and m["collapse"]["one step only"]["value"] < m["collapse"]["before"]["value"]
    and m["collapse_by_one_step"]["one step only"]["low"] > 2 * m["collapse"]["one step only"]["high"],
    "robust/evaluate": lambda m: m["accuracy"]["low"] > 0.9 and 0.4 < m["robust_accuracy"]["low"] and m["robust_accuracy"]["high"] < m["accuracy"]["low"]
    and m["checks_failed"] == [] and m["checks_failed_by_the_plain_net"] == 0 and m["checks_failed_by_the_rounded_net"] >= 3
    and m["rounded"]["ten steps along the slope"]["low"] > m["rounded"]["random search"]["high"] + 0.5 and m["sweep_largest_difference"] <= 4
    and m["sweep_cost"]["APGD, 50 steps"] < 1.5 and m["linear_gap"] <= 1 and m["standing_of_60"]["ours"] <= m["standing_of_60"].get("torchattacks", 60),
    "robust/certify": lambda m: m["certified_by_intervals"]["low"] > 0.6 and accuracy(m["certified_by_intervals"]) <= accuracy(m["under_pgd_by_intervals"])
    and accuracy(m["certified_ordinary"]) < 0.05 and max(m["corner_difference"], m["linear_difference"], m["library_difference"]) < 1e-9
    and m["looseness"]["1"] < 1.001 and m["looseness"]["6"] > 20 and m["lowest_coverage"]["exact"] >= 0.95 > m["lowest_coverage"]["normal"]
    and m["longer_than_the_distance"]["low"] < 0.05 and m["turned"] == [0, m["digits_read_by_the_linear_model"]] and m["false_certificates"]["as derived"]["low"] <= 0.05
    and 0.05 < m["false_certificates"]["chosen by the draws that count"]["low"] < 0.1 and m["false_certificates"]["the share instead of a bound"]["low"] > 0.4
    and m["predict_disagreements"] == m["certificates_broken"] == 0
    and accuracy(m["certified_by_noise"]["noise"]) > accuracy(m["certified_by_noise"]["ordinary"]),
    "robust/text": lambda m: m["attained_of_closed_form"] > 0.9999 and m["batch_mate_difference"] < 1e-4 and m["central_difference"] < 1e-7
    and m["curve"]["accuracy"] == sorted(m["curve"]["accuracy"], reverse=True) and m["curve"]["accuracy"][-1] < 0.5 * m["curve"]["accuracy"][0]
    and accuracy(m["fooled_by_swaps"]) > 0.05 and m["largest_differences"]["neighbours not shared with scikit-learn"] <= 2
    and max(m["largest_differences"]["slope of FGM, two backward passes"], m["largest_differences"]["divergence, torch"]) < 1e-10
    and len(m["gains"]) == 10 and all(row["low"] <= row["value"] <= row["high"] and abs(row["value"] - mean(m["scores"][f"{row['objective']}, {row['measure']}"])
                                     + mean(m["scores"][f"ordinary, {row['measure']}"])) < 1e-9 for row in m["gains"])
    and all(abs(row["counted"] / row["predicted"] - 1) < 0.02 for row in m["costs"].values()),
    "tour": lambda m: m["accuracy"]["value"] >= 0.97 and abs(m["first_loss"] - 2.303) < 0.1 and m["loss_after_one_step"] < m["first_loss"]
    and m["robust_accuracy_ordinary"] < 0.1 and m["robust_accuracy_adversarial"] > m["robust_accuracy_ordinary"] + 0.25 and m["accuracy_adversarial"] > 0.93
    and m["text_accuracy_minilm_fine_tuned"]["low"] > 0.5,
    "headless/parameters": lambda m: m["let_through_here"] == 0 and m["let_through_by_papermill"] == m["bad_requests"],
    "headless/report": lambda m: m["addresses_fetched"] == 0 and m["formulas_translated"] == 1,
    "headless/run": lambda m: m["statuses"] == ["ok", "failed", "killed"] and abs(m["pi"] - 3.14159) < 0.15,
    "headless/kernel": lambda m: m["answers"] == ["3"] and m["forked"] == m["kernel_ended_with_zygote"] == m["replaced"] == kernel.can_fork(),
    "headless/sweep": lambda m: m["runs"] == 9 and m["error_of_the_mean"] < 0.1 and m["interval_largest_difference"] < 1e-12 and m["statuses"] == ["failed", "ok", "ok"],
    "headless/cli": lambda m: m["exit_codes"] == [0, 2, 2, 2, 2, 2],
}


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_notebook_runs_and_finds_what_it_claims(name, tmp_path):
    done = run(name, out=tmp_path / "run")
    assert done.metrics, f"{name} records nothing"
    assert name in EXPECTED, f"{name} has no expectation in EXPECTED"
    assert EXPECTED[name](done.metrics), done.metrics
    assert done.peak_memory < 4096
    assert "<script" not in done.report.read_text(encoding="utf-8")
    outputs = [output for cell in nbformat.read(done.notebook, 4).cells for output in cell.get("outputs", [])]
    assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]


def test_kernels_of_tests_have_no_network(tmp_path):
    cell = "import socket\nfrom bigmodel_nb.kit.record import record\n" \
           "try:\n    socket.create_connection(('192.0.2.1', 80), timeout=1)\nexcept OSError as error:\n    record('said', str(error))"
    nbformat.write(new_notebook(cells=[new_code_cell(cell)]), tmp_path / "reach.ipynb")
    done = run(str(tmp_path / "reach.ipynb"), out=tmp_path / "run")
    assert done.metrics["said"].startswith("the network is off in tests")
