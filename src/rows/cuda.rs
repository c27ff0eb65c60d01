//! The parameters that all kernels over rows with targets share: `kernels/targets.cuh`.

use crate::check;
use crate::cuda::gpu::Gpu;
use crate::cuda::indices::index_range;
use crate::cuda::launch::{InputView, Launch, Tag, Workspace, output, to_host};
use crate::custom_op::Arg;
use crate::reduction::{Denominator, LossForm};
use crate::rows::layout::{RowPlaces, Rows};
use crate::rows::options::{LockedRowOptions, RowOptions};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::{DType, Result, Shape, bail};
use cudarc::driver::{CudaStream, CudaView, CudaViewMut, DeviceRepr};
use std::sync::Arc;

/// `Strides` of the kernels.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Strides {
    pub inner: i64,
    pub outer_stride: i64,
    pub inner_stride: i64,
    pub class_stride: i64,
}

impl Strides {
    pub fn of(rows: &Rows) -> Self {
        Strides {
            inner: rows.inner as i64,
            outer_stride: rows.outer_stride as i64,
            inner_stride: rows.inner_stride as i64,
            class_stride: rows.class_stride as i64,
        }
    }
}

/// `RowParams` of the kernels, where its fields are explained.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RowParams {
    pub rows: i64,
    pub ignore_index: i64,
    pub keep: f64,
    pub normalizer: f64,
    pub grad_scale: f64,
    pub classes: i32,
    pub target: Tag,
    pub counted: i32,
    pub counts: i32,
    pub row_weight: Tag,
    pub row_places: RowPlaces,
}

// SAFETY: plain numbers, laid out as in C on both sides
unsafe impl DeviceRepr for RowParams {}

impl RowParams {
    /// Of rows without targets.
    pub fn untargeted(name: &str, rows: &Rows) -> Result<Self> {
        let Ok(classes) = i32::try_from(rows.classes) else {
            bail!("{name}: {} classes, expected fewer than 2^31 on CUDA", rows.classes)
        };
        Ok(RowParams {
            rows: rows.count() as i64,
            ignore_index: 0,
            keep: 1.0,
            normalizer: 1.0,
            grad_scale: 1.0,
            classes,
            target: Tag::U32,
            counted: 0,
            counts: 0,
            row_weight: Tag::F32,
            row_places: RowPlaces::default(),
        })
    }

    /// Of rows with targets of `dtype`.
    pub fn new(name: &str, rows: &Rows, (options, form): (&RowOptions, &LossForm), dtype: DType) -> Result<Self> {
        let all_count = dtype.is_float() && options.row_weight.is_none();
        let (counted, normalizer) = match form {
            LossForm::Scalar(Denominator::Counted) if all_count => (false, rows.count() as f64),
            LossForm::Scalar(Denominator::Counted) => (true, 1.0),
            LossForm::Scalar(Denominator::Value(value)) => (false, *value),
            // the kernels read it
            LossForm::Scalar(Denominator::Tensor(_)) => (false, 1.0),
            LossForm::Each => (false, 1.0),
        };
        let places = options.row_weight.as_ref().map(|weight| match RowPlaces::of(weight.layout()) {
            Some(places) => Ok((Tag::of(weight.dtype())?, places)),
            None => bail!("{name}: row weights whose strides {:?} don't merge into two", weight.stride()),
        });
        let (row_weight, row_places) = places.transpose()?.unwrap_or((Tag::F32, RowPlaces::default()));
        Ok(RowParams {
            ignore_index: options.ignore_index,
            target: Tag::of(dtype)?,
            counted: counted as i32,
            normalizer,
            grad_scale: options.grad_scale,
            row_weight,
            row_places,
            ..Self::untargeted(name, rows)?
        })
    }
}

/// What kernels read beside the logits: found to have an element for each that a kernel reads.
pub(crate) struct RowOperands<'a> {
    target: InputView<'a>,
    weight: Option<InputView<'a>>,
    row_weight: Option<InputView<'a>>,
    normalizer: Option<InputView<'a>>,
}

impl<'a> RowOperands<'a> {
    /// Of rows in tensors of `shape`, with a loss in the dtype `arithmetic`.
    pub fn new(
        name: &str,
        (rows, shape, arithmetic): (&Rows, &Shape, DType),
        (target, layout): Arg<'a, CudaStorage>,
        locked: &'a LockedRowOptions,
    ) -> Result<Self> {
        if check::is_index(target.dtype()) {
            let indices = index_range(name, layout)?.len();
            if indices != rows.count() {
                return Err(check::wrong_count(name, indices, rows.count()));
            }
        } else if layout.shape() != shape {
            bail!("{name}: target of shape {:?}, expected the logits' {shape:?}", layout.shape());
        }
        let [weight, row_weight, normalizer] = locked.args::<CudaStorage>(name)?;
        if let Some((storage, layout)) = row_weight
            && layout.shape().elem_count() != rows.count()
        {
            bail!("{name}: row weights {:?} of dtype {:?} for {} rows", layout.dims(), storage.dtype(), rows.count());
        }
        if let Some((storage, layout)) = normalizer
            && (layout.shape().elem_count() != 1 || storage.dtype() != DType::F64)
        {
            bail!("{name}: normalizer {:?} of dtype {:?}, expected a scalar f64", layout.dims(), storage.dtype());
        }
        if let Some((weight, layout)) = weight {
            let dense = layout.is_contiguous() && layout.shape().elem_count() == rows.classes;
            if !dense || weight.dtype() != arithmetic {
                bail!(
                    "{name}: class weights {:?} of dtype {:?}, expected {} contiguous ones of {arithmetic:?}",
                    layout.dims(),
                    weight.dtype(),
                    rows.classes
                );
            }
        }
        let view = |arg: Option<Arg<'a, CudaStorage>>| {
            arg.map(|(storage, layout)| InputView::new(storage, layout)).transpose()
        };
        Ok(RowOperands {
            target: InputView::new(target, layout)?,
            weight: view(weight)?,
            row_weight: view(row_weight)?,
            normalizer: view(normalizer)?,
        })
    }

    pub fn views(&self) -> TargetViews<'_> {
        let RowOperands { target, weight, row_weight, normalizer } = self;
        fn bytes<'b>(view: &'b Option<InputView>) -> Option<&'b CudaView<'b, u8>> {
            view.as_ref().map(|view| &view.bytes)
        }
        TargetViews([Some(&target.bytes), bytes(weight), bytes(row_weight), bytes(normalizer)])
    }
}

/// `Targets` of the kernels: the targets of all rows, the weights of classes and of rows, and the normalizer.
#[derive(Clone, Copy)]
pub(crate) struct TargetViews<'a>([Option<&'a CudaView<'a, u8>>; 4]);

impl<'a> TargetViews<'a> {
    /// Adds them to a launch as the kernels' `Targets`, whose order this is.
    pub fn push(self, launch: &mut Launch<'a>) {
        launch.read_all(&self.0);
    }
}

/// Where a kernel leaves the losses.
pub(crate) enum LossOutput<'a> {
    /// One for each row.
    Rows(CudaViewMut<'a, u8>),
    /// One number. A grid of several blocks leaves partial sums on the way.
    Scalar { result: CudaViewMut<'a, u8>, partials: Option<Partials> },
}

/// The sums (loss, weight) of each block, and the counter by which the last block to arrive knows that it adds them.
#[derive(Clone, Copy)]
pub(crate) struct Partials {
    /// Where the sums begin in the call's workspace.
    sums: u64,
    ticket: u64,
}

impl Partials {
    /// Of a launch over `blocks` blocks (a cluster counts as one) that makes one number of the losses. A lone block has
    /// none.
    pub fn of(
        form: &LossForm,
        blocks: u32,
        workspace: &mut Workspace,
        (gpu, stream): (&Gpu, &Arc<CudaStream>),
    ) -> Result<Option<Self>> {
        if form.is_each() || blocks == 1 {
            return Ok(None);
        }
        let sums = workspace.add(blocks as usize * size_of::<[f64; 2]>());
        Ok(Some(Partials { sums, ticket: gpu.ticket(stream)? }))
    }
}

/// [`LossOutput`] as the kernels' parameters: absent ones are null pointers.
pub(crate) struct LossPointers<'a, 'b> {
    pub rows: Option<&'b mut CudaViewMut<'a, u8>>,
    pub sums: u64,
    pub ticket: u64,
    pub result: Option<&'b mut CudaViewMut<'a, u8>>,
}

impl<'a> LossOutput<'a> {
    /// The loss in its form.
    pub fn new(loss: &'a mut CudaStorageSlice, form: &LossForm, partials: Option<Partials>) -> Result<Self> {
        let loss = output(loss)?;
        Ok(match form {
            LossForm::Each => LossOutput::Rows(loss),
            LossForm::Scalar(_) => LossOutput::Scalar { result: loss, partials },
        })
    }

    /// For a workspace at that address.
    pub fn pointers(&mut self, workspace: u64) -> LossPointers<'a, '_> {
        match self {
            LossOutput::Rows(rows) => LossPointers { rows: Some(rows), sums: 0, ticket: 0, result: None },
            LossOutput::Scalar { result, partials } => {
                let (sums, ticket) = partials.map_or((0, 0), |partials| (workspace + partials.sums, partials.ticket));
                LossPointers { rows: None, sums, ticket, result: Some(result) }
            }
        }
    }
}

/// Looks for class indices out of range in rows that weigh something, where the options ask for it: at the price of
/// waiting for the device.
pub(crate) fn check_indices(
    name: &str,
    options: &RowOptions,
    (target, layout): Arg<CudaStorage>,
    rows: &Rows,
) -> Result<()> {
    let range = index_range(name, layout)?;
    if !options.target_check || rows.count() == 0 {
        return Ok(());
    }
    let device = &target.device;
    let mut indices: Vec<i64> = match &target.slice {
        CudaStorageSlice::U8(s) => to_host(device, &s.slice(range))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::U32(s) => to_host(device, &s.slice(range))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::I16(s) => to_host(device, &s.slice(range))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::I32(s) => to_host(device, &s.slice(range))?.into_iter().map(i64::from).collect(),
        CudaStorageSlice::I64(s) => to_host(device, &s.slice(range))?,
        _ => return Err(check::not_class_indices(name, target.dtype())),
    };
    if let Some(weights) = options.row_weights(DType::F64)? {
        let weights: Vec<f64> = weights.to_vec1()?;
        let weightless = indices.iter_mut().zip(weights).filter(|(_, weight)| *weight == 0.0);
        weightless.for_each(|(index, _)| *index = options.ignore_index);
    }
    check::class_range(name, indices, target.dtype(), rows.classes, options.ignore_index)
}
