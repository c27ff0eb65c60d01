//! A network with one hidden layer.

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Linear, Module};

use crate::rng::Rng;

pub struct Mlp {
    hidden: Linear,
    output: Linear,
    vars: Vec<Var>,
}

impl Mlp {
    pub fn new(inputs: usize, hidden: usize, outputs: usize, rng: &mut Rng, device: &Device) -> Result<Self> {
        let mut vars = Vec::new();
        // The variance that keeps a layer's outputs at the scale of its inputs, doubled before a relu.
        let hidden_layer = layer(inputs, hidden, 2., rng, device, &mut vars)?;
        let output_layer = layer(hidden, outputs, 1., rng, device, &mut vars)?;
        Ok(Self { hidden: hidden_layer, output: output_layer, vars })
    }

    pub fn vars(&self) -> Vec<Var> {
        self.vars.clone()
    }

    /// The outputs, computed in that dtype with weights rounded to it; gradients go to the f32 weights.
    pub fn forward_in(&self, dtype: DType, features: &Tensor) -> Result<Tensor> {
        let rounded = |layer: &Linear| -> Result<Linear> {
            let bias = layer.bias().map(|bias| bias.to_dtype(dtype)).transpose()?;
            Ok(Linear::new(layer.weight().to_dtype(dtype)?, bias))
        };
        let hidden = rounded(&self.hidden)?.forward(&features.to_dtype(dtype)?)?.relu()?;
        rounded(&self.output)?.forward(&hidden)
    }
}

impl Module for Mlp {
    fn forward(&self, features: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden.forward(features)?.relu()?;
        self.output.forward(&hidden)
    }
}

fn layer(
    inputs: usize,
    outputs: usize,
    gain: f64,
    rng: &mut Rng,
    device: &Device,
    vars: &mut Vec<Var>,
) -> Result<Linear> {
    let deviation = (gain / inputs as f64).sqrt();
    let weight: Vec<f32> = (0..inputs * outputs).map(|_| (rng.normal() * deviation) as f32).collect();
    let weight = Var::from_vec(weight, (outputs, inputs), device)?;
    let bias = Var::from_vec(vec![0f32; outputs], outputs, device)?;
    let linear = Linear::new(weight.as_tensor().clone(), Some(bias.as_tensor().clone()));
    vars.extend([weight, bias]);
    Ok(linear)
}
