"""The slow tests that `bash scripts/test.sh` runs without --all: one of each kind, so that no room is left out.

Under a room stand those of its tests that start ranks or browsers; a room without any has its quick tests alone.
"""

EQUALITY = "tests/integration/test_equality.py::test_losses_and_gradient_norms_are_bit_identical_to_megatrons_default"
TOUR = {
    "ab": ("tests/ab/test_ab_scripts.py::test_arms_alternate_and_a_failing_one_is_a_row_of_the_report",),
    "bench": (
        "tests/bench/test_bench.py::test_every_arm_runs_in_real_processes_and_none_beats_the_clock",
        "tests/bench/test_emulation.py::test_collectives",
    ),
    "check": ("tests/check/test_dry_run.py::test_the_table_names_layers_plans_memory_and_what_was_changed",),
    "doctor": ("tests/doctor/test_doctor.py::test_the_equality_run_on_this_machine",),
    "integration": (
        f"{EQUALITY}[4-2-1-1-2-features7]",
        f"{EQUALITY}[2-2-1-2-2-features3]",  # ZeRO-1
        "tests/integration/test_activation.py::test_enable_twice_and_disable_leave_megatron_as_it_was",
        "tests/integration/test_checkpoints.py::test_switching_the_schedule_changes_no_bit[replicated-first0-then0]",
        "tests/integration/test_faults.py::test_an_error_of_one_rank[raise]",
        "tests/integration/test_fully_sharded.py::test_without_clipping_every_loss_has_the_same_bits",
        "tests/integration/test_groups.py::test_ranks_with_different_groups_before_make_their_channels",
        "tests/integration/test_hostile.py::test_the_transport_is_hostile",
        "tests/integration/test_refusals.py::test_no_pipeline_ranks",
        "tests/integration/test_schedule_features.py::test_schedule_features[2-features0]",
        "tests/integration/test_shapes.py::test_three_ranks_of_three_chunks_of_one_layer",
        "tests/integration/test_trace.py"
        "::test_every_action_of_the_plan_is_in_the_trace_and_the_losses_have_the_same_bits[2-2]",
        "tests/integration/test_traffic.py::test_the_bytes_of_a_ring",
    ),
    "pages": ("tests/test_pages.py::test_the_page_of_a_schedule_shows_the_numbers_of_the_terminal",),
    "planner": (
        "tests/planner/test_memory.py::test_state_is_what_megatron_allocates[untied-bf16-zero1-1-2-1]",
        "tests/planner/test_plan.py::test_several_batches_are_compared_and_drawn_and_written",
        "tests/planner/test_search.py::test_what_is_shown_as_the_fastest_of_a_schedule_was_replayed",
    ),
    "schedule": (
        "tests/schedule/test_check.py::test_damaged_plans_are_rejected_exactly_when_their_meaning_changes",
        "tests/schedule/test_every_shape.py::test_every_plan_is_proved_and_its_peaks_are_those_of_the_formula",
        "tests/schedule/test_replay.py"
        "::test_with_short_backwards_a_send_waits_only_on_5_ranks_or_more_and_only_in_idle_time[True]",
    ),
    "words": (
        "tests/test_configs.py::test_megatron_accepts_every_file_and_understands_it_as_the_planner_does",
        "tests/test_fuzz.py::test_jobs_refuse_a_bad_command_line_in_at_most_three_lines",
        "tests/test_fuzz.py::test_no_command_line_and_no_file_ends_in_a_traceback_or_half_a_file[show]",
    ),
}
