"""What the short form of the tests leaves out, and `--all` runs: further cases of a test, whose other cases walk the same code, and long tests
of what others show in parts.

Each line is a file, a test of it, and one of its cases; of a file by itself all tests, of a test by itself the whole.
"""

_TEXT = """
runs/test_brought_models.py::test_what_people_bring_is_trained_as_plain_pytorch_trains_it[a piece of a tensor]
runs/test_brought_models.py::test_what_people_bring_is_trained_as_plain_pytorch_trains_it[packed sequences of a GRU]
runs/test_cifar.py::test_one_is_trained
runs/test_compiled_layers.py
runs/test_compiler.py::test_a_run_stays_within_plan_and_budget
runs/test_compiler.py::test_exact_is_same_as_backprop[tied words, loss in chunks]
runs/test_compiler.py::test_local_methods_learn_the_same_but_for_last_bits[pnn]
runs/test_compiler.py::test_local_methods_learn_the_same_but_for_last_bits[recovery]
runs/test_exact.py::test_an_embedding_that_is_tied_to_the_head_is_same_as_in_plain_pytorch[accumulated]
runs/test_exact.py::test_an_embedding_that_is_tied_to_the_head_is_same_as_in_plain_pytorch[clipped-whole]
runs/test_exact.py::test_an_embedding_that_is_tied_to_the_head_is_same_as_in_plain_pytorch[clipped]
runs/test_exact.py::test_exact_with_a_partition_for_every_layer_is_same_as_plain_pytorch[convnext]
runs/test_exact.py::test_exact_with_a_partition_for_every_layer_is_same_as_plain_pytorch[densenet]
runs/test_exact.py::test_exact_with_a_partition_for_every_layer_is_same_as_plain_pytorch[mobilenet]
runs/test_exact.py::test_exact_with_a_partition_for_every_layer_is_same_as_plain_pytorch[vit]
runs/test_exact.py::test_exact_with_partitions_of_some_layers_is_same_as_plain_pytorch[vit-2]
runs/test_exact_lifecycle.py::test_a_run_that_was_interrupted_and_resumed_is_same_as_uninterrupted[clipped]
runs/test_families.py::test_torchvision_family_is_same_as_model[convnext]
runs/test_families.py::test_torchvision_family_is_same_as_model[efficientnet]
runs/test_families.py::test_torchvision_family_is_same_as_model[googlenet]
runs/test_families.py::test_torchvision_family_is_same_as_model[inception_v3]
runs/test_families.py::test_torchvision_family_is_same_as_model[maxvit]
runs/test_families.py::test_torchvision_family_is_same_as_model[mnasnet]
runs/test_families.py::test_torchvision_family_is_same_as_model[mobilenet_v2]
runs/test_families.py::test_torchvision_family_is_same_as_model[resnet]
runs/test_families.py::test_torchvision_family_is_same_as_model[resnext]
runs/test_families.py::test_torchvision_family_is_same_as_model[swin_v2]
runs/test_families.py::test_torchvision_family_is_same_as_model[vgg]
runs/test_families.py::test_torchvision_family_is_same_as_model[vit]
runs/test_families.py::test_torchvision_family_is_same_as_model[wide_resnet]
runs/test_generate.py::test_the_command_prints_texts_or_json
runs/test_hf_capture.py::test_models_of_transformers_are_cut_at_their_blocks[GPT-2]
runs/test_hf_capture.py::test_models_of_transformers_are_cut_at_their_blocks[Gemma 3]
runs/test_hf_capture.py::test_partitions_that_learn_by_themselves_hold_the_same_table
runs/test_hf_models.py::test_a_run_that_ends_before_it_is_done_writes_the_same_folder
runs/test_incubate.py::test_a_plan_counts_the_tail_and_its_error_names_a_budget_that_works
runs/test_incubate.py::test_augmented_views_are_written_by_thin_parts
runs/test_incubate.py::test_stopped_anywhere_and_resumed_is_same_as_uninterrupted[14]
runs/test_incubate.py::test_stopped_anywhere_and_resumed_is_same_as_uninterrupted[20]
runs/test_incubate.py::test_stopped_anywhere_and_resumed_is_same_as_uninterrupted[2]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[EmbeddingBag]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[LeNet]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[encoder]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[functions, lists, lambdas]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[in place]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[low-rank adapters]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[norms of weights as before, pruning]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[one and three dimensions]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[spectra]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[stochastic depth]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[two inputs]
runs/test_kept_models.py::test_a_model_as_people_write_it_is_same_as_plain_torch[video]
runs/test_kept_products.py::test_exact_with_kept_products_is_same_as_plain_pytorch[unet]
runs/test_late_surprises.py::test_a_vit_of_small_images_is_as_in_plain_pytorch
runs/test_neuroflux.py::test_a_stopped_run_goes_on_to_the_same_bytes[augmented]
runs/test_neuroflux.py::test_a_stopped_run_goes_on_to_the_same_bytes[laps]
runs/test_neuroflux.py::test_units_learn_which_samples_are_alike_as_in_plain_pytorch[similarity]
runs/test_optimizer_in_backward.py::test_gradients_of_one_layer_at_a_time_are_in_memory[backprop-0.9]
runs/test_optimizer_in_backward.py::test_gradients_of_one_layer_at_a_time_are_in_memory[pnn-0.9]
runs/test_optimizer_in_backward.py::test_stepping_in_backward_is_same_as_after_it[conv-backprop-]
runs/test_optimizer_in_backward.py::test_stepping_in_backward_is_same_as_after_it[conv-pnn-]
runs/test_optimizer_in_backward.py::test_stepping_in_backward_is_same_as_after_it[gpt, tied-backprop-]
runs/test_plans.py::test_what_exact_moves_is_what_a_run_reports[{'clip_norm': 1.0}]
runs/test_plans.py::test_what_exact_moves_is_what_a_run_reports[{'micro_batch': 16}]
runs/test_plans.py::test_what_exact_moves_is_what_a_run_reports[{'optimizer': 'sgd'}]
runs/test_precision.py::test_clipping_and_chunks_are_those_of_plain_autocast[fp16]
runs/test_precision.py::test_every_method_learns_in_lower_precision[pnn-fp16]
runs/test_precision.py::test_exact_is_same_as_plain_autocast[conv-bf16]
runs/test_precision.py::test_exact_is_same_as_plain_autocast[vit-bf16]
runs/test_precision.py::test_exact_is_same_as_plain_autocast[vit-fp16]
runs/test_precision.py::test_exact_is_same_as_plain_pytorch_with_channels_last[conv-fp32]
runs/test_precision.py::test_exact_is_same_as_plain_pytorch_with_channels_last[resnet-bf16]
runs/test_precision.py::test_other_methods_learn_with_channels_last
runs/test_pretrained.py::test_mobilenet_is_planned_from_its_imagenet_weights
runs/test_quantized_state.py::test_a_run_with_quantized_state_that_was_stopped_and_resumed_is_same_as_uninterrupted[bf16-exact-stops0]
runs/test_quantized_state.py::test_the_plan_foresees_less_and_the_peak_keeps_to_it[backprop]
runs/test_recovery.py::test_a_recovery_that_was_interrupted_and_resumed_is_same_as_uninterrupted[0.1-stops1]
runs/test_sequences.py::test_a_model_that_writes_is_trained_as_by_its_own_loss[bart-sizes1-0-None]
runs/test_sequences.py::test_an_adapter_of_a_model_with_classes_is_loaded_by_peft[a new head]
runs/test_sequences.py::test_texts_are_classified_as_by_the_models_own_loss[llama-sizes1]
runs/test_step_slices.py::test_steps_of_tied_weights_by_slices_are_same_as_plain_pytorch[clipped]
runs/test_step_slices.py::test_steps_of_tied_weights_by_slices_are_same_as_plain_pytorch[cut]
runs/test_training.py::test_a_run_on_kept_activations_that_is_stopped_anywhere_goes_on_to_the_same_bytes[bfloat16-pnn]
runs/test_training.py::test_boundaries_of_several_tensors_train_end_to_end
runs/test_transfer_counts.py::test_a_step_moves_each_layer_in_few_copies_and_waits_for_the_device_at_most_four_times[resnet50]
runs/test_transfers.py::test_a_run_whose_weights_stay_in_host_memory_writes_the_same_files[in backward-no room]
runs/test_transfers.py::test_a_run_whose_weights_stay_in_host_memory_writes_the_same_files[in backward-room for all]
runs/test_transfers.py::test_a_run_whose_weights_stay_in_host_memory_writes_the_same_files[in backward-room for some]
runs/test_transfers.py::test_a_run_whose_weights_stay_in_host_memory_writes_the_same_files[kept-no room]
runs/test_transfers.py::test_a_run_whose_weights_stay_in_host_memory_writes_the_same_files[kept-room for all]
runs/test_transfers.py::test_a_run_with_delayed_copies_is_as_one_without_copies[exact-1,2,3]
runs/test_transfers.py::test_a_run_with_delayed_copies_is_as_one_without_copies[exact-2-0.1-adamw]
runs/test_transfers.py::test_a_run_with_delayed_copies_is_as_one_without_copies[pnn-2-1]
system/test_cpu_device.py::test_private_mappings_of_files_are_no_use_while_a_constructor_runs
system/test_host_tier.py::test_a_run_that_is_killed_goes_on_from_its_last_commit_to_the_same_weights
system/test_kills.py::test_signals_one_after_the_other_and_resumed_is_same_as_uninterrupted
system/test_long_runs.py::test_durability_is_measured_by_a_run_without_it
system/test_long_runs.py::test_nothing_grows_with_the_number_of_residencies
system/test_results.py::test_a_hundred_blocks_of_a_sixtieth_of_the_budget_do_not_fill_the_heap_with_holes
system/test_results.py::test_mlp_larger_than_its_budget_trains_within_it
system/test_results.py::test_resnet_trains_and_its_weights_load_into_torchvisions_own
system/test_supervisor.py::test_a_closed_terminal_stops_cleanly_and_the_run_resumes_to_the_same_bits
system/test_supervisor.py::test_a_crash_is_gone_on_from_with_half_the_micro_batch
system/test_supervisor.py::test_the_second_signal_ends_it_at_once[15-143]
system/test_torchrun.py::test_torchrun_that_was_stopped_and_lost_a_rank_gives_the_bits_of_one_process_and_one_result
unit/profiling/test_memory_profiler.py::test_predicted_peaks_bound_those_of_real_runs_closely[transformer]
"""
LONG = tuple(_TEXT.strip().splitlines())


def is_left_out(nodeid: str) -> bool:
    """Decide whether the short form leaves a test out.

    Args:
        nodeid: as pytest names it, from the repository's root.

    Example:
        >>> is_left_out("tests/runs/test_compiled_layers.py::test_any"), is_left_out("tests/runs/test_exact.py::test_any[conv]")
        (True, False)
    """
    name = nodeid.removeprefix("tests/")
    return name in _LEFT_OUT or name.partition("::")[0] in _LEFT_OUT


def is_named(name: str, arguments: list[str]) -> bool:
    """Decide whether one of the command line's arguments names a test: itself, or all of its cases.

    Example:
        >>> [is_named("a.py::test_one[conv]", [text]) for text in ("a.py::test_one", "a.py::test_one[conv]", "a.py::test_o")]
        [True, True, False]
    """
    return any(name == argument or name.startswith((f"{argument}[", f"{argument}::")) for argument in arguments)


_LEFT_OUT = frozenset(LONG)
