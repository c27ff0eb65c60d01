//! Cross-entropy on a CUDA device: sizes whose launches differ, and what only a device can get wrong.

use crate::common::{INDICES, Random, bits, cuda, indices, is_slow, tensor, values};
use candle_core::{DType, Device, Result, Tensor};
use candle_fused_loss::{CrossEntropyLoss, Reduction};

fn close(what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
    let (got, expected) = (values(got)?, values(expected)?);
    let largest = expected.iter().fold(0f64, |m, v| m.max(v.abs()));
    for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
        assert!(
            (g - e).abs() <= tolerance * e.abs().max(0.1 * largest),
            "{what}: element {i} is {g:e}, expected {e:e}"
        );
    }
    Ok(())
}

/// Few rows of vocabularies: split over blocks, in clusters, with rows that begin anywhere.
#[test]
fn vocabularies_match_the_cpu() -> Result<()> {
    let gpu = cuda();
    for (rows, classes, dtype) in
        [(2, 32_000, DType::BF16), (3, 50_257, DType::BF16), (1, 128_256, DType::F16), (2, 50_257, DType::F32)]
    {
        matches_the_cpu(rows, classes, dtype, &gpu)?;
    }
    Ok(())
}

/// More rows than are split over blocks: each is a cluster's, of as many blocks and as much shared memory as a training
/// step's, which no lowered threshold shows.
#[test]
#[ignore = "takes minutes on the software GPU"]
fn clusters_at_full_size_match_the_cpu() -> Result<()> {
    let gpu = cuda();
    for (rows, classes, dtype) in [
        (300, 50_257, DType::BF16),
        (300, 128_256, DType::BF16),
        (64, 256_000, DType::BF16),
        (64, 262_144, DType::BF16),
        (64, 256_000, DType::F16),
        (300, 128_256, DType::F32),
    ] {
        matches_the_cpu(rows, classes, dtype, &gpu)?;
    }
    Ok(())
}

/// Each row's loss, its gradient and the mean's.
fn matches_the_cpu(rows: usize, classes: usize, dtype: DType, gpu: &Device) -> Result<()> {
    let mut random = Random::new(classes as u64);
    let logits = tensor(&random.normals(rows * classes, 2.0), &[rows, classes], dtype, &Device::Cpu)?;
    let target = indices(&random.classes(rows, classes), &[rows], DType::U32, &Device::Cpu)?;
    let (there, target_there) = (logits.to_device(gpu)?, target.to_device(gpu)?);
    for reduction in [Reduction::None, Reduction::Mean] {
        let loss = CrossEntropyLoss::new().with_reduction(reduction);
        let (expected, expected_grad) = loss.loss_and_grad(&logits, &target)?;
        let (got, grad) = loss.loss_and_grad(&there, &target_there)?;
        let what = format!("{rows} x {classes} {dtype:?} {reduction:?}");
        close(&format!("{what}: loss"), &got, &expected, 4e-6)?;
        // sums of 10^5 terms in f32, rounded to the logits' dtype
        let tolerance = if dtype == DType::F32 { 4e-6 } else { 1e-2 };
        close(&format!("{what}: gradient"), &grad, &expected_grad, tolerance)?;
    }
    Ok(())
}

/// The gradient in place is the gradient, bit for bit.
#[test]
fn in_place_is_the_same() -> Result<()> {
    let gpu = cuda();
    for (rows, classes) in [(70, 10), (70, 64), (3, 1001), (200, 999), (2, 40_001)] {
        let mut random = Random::new(classes as u64);
        let logits = tensor(&random.normals(rows * classes, 2.0), &[rows, classes], DType::BF16, &gpu)?;
        let target = indices(&random.classes(rows, classes), &[rows], DType::I64, &gpu)?;
        for loss in [CrossEntropyLoss::new(), CrossEntropyLoss::new().with_label_smoothing(0.1).with_z_loss(1e-3)] {
            let (expected, grad) = loss.loss_and_grad(&logits, &target)?;
            let own = logits.copy()?;
            let got = loss.loss_and_grad_inplace(&own, &target)?;
            assert_eq!(values(&got)?, values(&expected)?, "{rows} x {classes}");
            assert_eq!(values(&own)?, values(&grad)?, "{rows} x {classes}");
        }
    }
    Ok(())
}

/// A target out of range is NaN in its row for each index dtype, and the device goes on.
#[test]
fn bad_targets_do_not_end_the_context() -> Result<()> {
    let gpu = cuda();
    let logits = tensor(&Random::new(1).normals(3 * 50, 1.0), &[3, 50], DType::F32, &gpu)?;
    for dtype in INDICES {
        let target = indices(&[1, 50, 2], &[3], dtype, &gpu)?;
        let rows = CrossEntropyLoss::new().with_reduction(Reduction::None).forward(&logits, &target)?;
        let finite = values(&rows)?.iter().map(|v| v.is_finite()).collect::<Vec<_>>();
        assert_eq!(finite, [true, false, true], "{dtype:?}");
        assert!(CrossEntropyLoss::new().with_target_check(true).forward(&logits, &target).is_err());
    }
    Ok(())
}

/// Two threads with one device, each with a stream of its own, so that their launches overlap: means of sizes between
/// one block and thousands, whose last blocks add up what all have left. The same bits as those of one thread alone.
#[test]
fn means_from_two_threads() -> Result<()> {
    let gpu = cuda();
    let (rounds, means, shapes) = match is_slow(&gpu) {
        true => (8, 60, [(8, 100), (130, 10), (300, 10), (65, 70), (700, 5)]),
        false => (50, 100, [(8, 1000), (4096, 1000), (30_000, 10), (2048, 4096), (700, 33)]),
    };
    let of_thread = |thread: u64| -> Result<Vec<Vec<u64>>> {
        let mut random = Random::new(thread);
        let inputs = shapes.map(|(rows, classes)| -> Result<_> {
            let logits = tensor(&random.normals(rows * classes, 2.0), &[rows, classes], DType::BF16, &gpu)?;
            Ok((logits, indices(&random.classes(rows, classes), &[rows], DType::U32, &gpu)?))
        });
        let inputs = inputs.into_iter().collect::<Result<Vec<_>>>()?;
        let loss = CrossEntropyLoss::new();
        let mean = |i: usize| loss.forward(&inputs[i % inputs.len()].0, &inputs[i % inputs.len()].1);
        // nothing waits between the launches of a round
        let round = |_| bits(&Tensor::stack(&(0..means).map(mean).collect::<Result<Vec<_>>>()?, 0)?);
        (0..rounds).map(round).collect()
    };
    let alone = [of_thread(1)?, of_thread(2)?];
    for attempt in 0..2 {
        let together = std::thread::scope(|scope| {
            let threads = [1, 2].map(|thread| scope.spawn(move || of_thread(thread)));
            threads.map(|thread| thread.join().expect("no panic"))
        });
        for (thread, (got, want)) in together.into_iter().zip(&alone).enumerate() {
            for (round, (got, want)) in got?.iter().zip(want).enumerate() {
                let wrong = got.iter().zip(want).filter(|(got, want)| got != want).count();
                assert_eq!(
                    wrong, 0,
                    "means that differ, of {means} in round {round} of thread {thread}, attempt {attempt}"
                );
            }
        }
    }
    Ok(())
}

/// Element offsets beyond 2^31: 8 GiB of logits and gradient, for a real device.
#[test]
#[ignore = "needs 10 GiB of device memory"]
fn more_than_2_31_elements() -> Result<()> {
    let gpu = cuda();
    let (rows, classes) = (65_600, 32_768);
    assert!(rows * classes > 1 << 31);
    let logits = Tensor::zeros((rows, classes), DType::BF16, &gpu)?;
    let target = Tensor::full(5u32, rows, &gpu)?;
    let loss = CrossEntropyLoss::new().with_reduction(Reduction::None);
    let expected = (classes as f64).ln();
    let losses = values(&loss.forward(&logits, &target)?)?;
    assert!(losses.iter().all(|l| (l / expected - 1.0).abs() < 1e-6));
    let (_, grad) = loss.loss_and_grad(&logits, &target)?;
    let last = values(&grad.narrow(0, rows - 1, 1)?)?;
    for (class, g) in last.iter().enumerate() {
        let expected = 1.0 / classes as f64 - (class == 5) as u8 as f64;
        assert!((g / expected - 1.0).abs() < 4e-3, "class {class}: {g}");
    }
    Ok(())
}
