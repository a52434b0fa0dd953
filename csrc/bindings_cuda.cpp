// With bindings.h all CUDA code that knows Python: integers become pointers, the GIL is released,
// what went wrong becomes an exception. Argument order follows the structs in pygan.h and
// pygan_cuda.h.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "bindings.h"
#include "pygan_cuda.h"

namespace py = pybind11;

namespace {

using pygan::bindings::Address;
using pygan::bindings::group_of;
using pygan::bindings::pointer;
namespace cuda = pygan::cuda;

void raise_unless_ok(const cuda::Outcome& outcome) {
  if (outcome.status != pygan::Status::ok) throw std::invalid_argument(cuda::describe(outcome));
  if (!outcome.ok()) throw std::runtime_error(cuda::describe(outcome));
}

pygan::GanLoss gan_loss_of(int dtype, const py::tuple& groups, Address loss) {
  pygan::GanLoss args{
      static_cast<pygan::DType>(dtype), {}, static_cast<int>(groups.size()), pointer<float>(loss)};
  for (size_t i = 0; i < groups.size() && i < 2; ++i) {
    args.groups[i] = group_of(groups[i].cast<py::tuple>());
  }
  return args;
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of pygan. Arrays are device addresses; see csrc/pygan_cuda.h.";

  module.def("unusable", &cuda::unusable);
  module.def("architectures", &cuda::architectures);

  py::class_<pygan::NormActShape>(module, "NormActShape", py::module_local())
      .def(py::init([](int dtype, int layout, int64_t batch, int64_t channels, int64_t spatial,
                       int64_t groups, int activation, float negative_slope) {
             return pygan::NormActShape{static_cast<pygan::DType>(dtype),
                                        static_cast<pygan::Layout>(layout),
                                        batch,
                                        channels,
                                        spatial,
                                        groups,
                                        static_cast<pygan::Activation>(activation),
                                        negative_slope,
                                        1};
           }),
           py::arg("dtype"), py::arg("layout"), py::arg("batch"), py::arg("channels"),
           py::arg("spatial"), py::arg("groups"), py::arg("activation"), py::arg("negative_slope"));

  module.def("norm_act_scratch", &cuda::norm_act_scratch, py::arg("shape"));

  module.def(
      "norm_act_forward",
      [](const pygan::NormActShape& shape, Address x, Address weight, Address bias, bool training,
         double eps, double momentum, Address running_mean, Address running_var, Address y,
         Address mean, Address invstd, Address coefficients, Address variance, Address scratch,
         Address stream) {
        const pygan::NormActForward args{shape,
                                         pointer<const void>(x),
                                         pointer<const float>(weight),
                                         pointer<const float>(bias),
                                         training,
                                         eps,
                                         momentum,
                                         pointer<float>(running_mean),
                                         pointer<float>(running_var),
                                         pointer<void>(y),
                                         pointer<float>(mean),
                                         pointer<float>(invstd),
                                         pointer<float>(coefficients),
                                         pointer<double>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(
            cuda::norm_act_forward(args, pointer<float>(variance), pointer<void>(stream)));
      },
      py::arg("shape"), py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("training"),
      py::arg("eps"), py::arg("momentum"), py::arg("running_mean"), py::arg("running_var"),
      py::arg("y"), py::arg("mean"), py::arg("invstd"), py::arg("coefficients"),
      py::arg("variance"), py::arg("scratch"), py::arg("stream"));

  module.def(
      "norm_act_backward",
      [](const pygan::NormActShape& shape, Address x, Address dy, Address weight, Address bias,
         Address mean, Address invstd, bool training, Address dx, Address dweight, Address dbias,
         Address scratch, Address stream) {
        const pygan::NormActBackward args{shape,
                                          pointer<const void>(x),
                                          pointer<const void>(dy),
                                          pointer<const float>(weight),
                                          pointer<const float>(bias),
                                          pointer<const float>(mean),
                                          pointer<const float>(invstd),
                                          training,
                                          pointer<void>(dx),
                                          pointer<float>(dweight),
                                          pointer<float>(dbias),
                                          pointer<double>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(cuda::norm_act_backward(args, pointer<void>(stream)));
      },
      py::arg("shape"), py::arg("x"), py::arg("dy"), py::arg("weight"), py::arg("bias"),
      py::arg("mean"), py::arg("invstd"), py::arg("training"), py::arg("dx"), py::arg("dweight"),
      py::arg("dbias"), py::arg("scratch"), py::arg("stream"));

  py::class_<pygan::StridedConvShape>(module, "StridedConvShape", py::module_local())
      .def(py::init([](int dtype, int weight_layout, int64_t batch, int64_t height, int64_t width,
                       int64_t big_height, int64_t big_width, int64_t small_channels,
                       int64_t big_channels) {
             return pygan::StridedConvShape{static_cast<pygan::DType>(dtype),
                                            static_cast<pygan::Layout>(weight_layout),
                                            batch,
                                            height,
                                            width,
                                            big_height,
                                            big_width,
                                            small_channels,
                                            big_channels,
                                            pygan::ConvMethod::direct,
                                            pygan::ConvMap::none,
                                            1};
           }),
           py::arg("dtype"), py::arg("weight_layout"), py::arg("batch"), py::arg("height"),
           py::arg("width"), py::arg("big_height"), py::arg("big_width"), py::arg("small_channels"),
           py::arg("big_channels"));

  module.def("image_conv_scratch", &cuda::image_conv_scratch, py::arg("shape"));

  module.def(
      "image_conv_up",
      [](const pygan::StridedConvShape& shape, Address small, Address gate, float negative_slope,
         Address weight, Address bias, int activation, Address big, Address stream) {
        const cuda::ImageConvUp args{shape,
                                     pointer<const void>(small),
                                     pointer<const void>(gate),
                                     negative_slope,
                                     pointer<const float>(weight),
                                     pointer<const float>(bias),
                                     static_cast<pygan::Activation>(activation),
                                     pointer<void>(big)};
        py::gil_scoped_release release;
        raise_unless_ok(cuda::image_conv_up(args, pointer<void>(stream)));
      },
      py::arg("shape"), py::arg("small"), py::arg("gate"), py::arg("negative_slope"),
      py::arg("weight"), py::arg("bias"), py::arg("activation"), py::arg("big"), py::arg("stream"));

  module.def(
      "image_conv_down",
      [](const pygan::StridedConvShape& shape, Address big, Address weight, Address bias,
         int activation, float negative_slope, Address small, Address stream) {
        const cuda::ImageConvDown args{shape,
                                       pointer<const void>(big),
                                       pointer<const float>(weight),
                                       pointer<const float>(bias),
                                       static_cast<pygan::Activation>(activation),
                                       negative_slope,
                                       pointer<void>(small)};
        py::gil_scoped_release release;
        raise_unless_ok(cuda::image_conv_down(args, pointer<void>(stream)));
      },
      py::arg("shape"), py::arg("big"), py::arg("weight"), py::arg("bias"), py::arg("activation"),
      py::arg("negative_slope"), py::arg("small"), py::arg("stream"));

  module.def(
      "image_conv_weight_grad",
      [](const pygan::StridedConvShape& shape, Address small, Address gate, float negative_slope,
         Address big, Address dweight, Address scratch, Address stream) {
        const cuda::ImageConvWeightGrad args{shape,
                                             pointer<const void>(small),
                                             pointer<const void>(gate),
                                             negative_slope,
                                             pointer<const void>(big),
                                             pointer<float>(dweight),
                                             pointer<float>(scratch)};
        py::gil_scoped_release release;
        raise_unless_ok(cuda::image_conv_weight_grad(args, pointer<void>(stream)));
      },
      py::arg("shape"), py::arg("small"), py::arg("gate"), py::arg("negative_slope"),
      py::arg("big"), py::arg("dweight"), py::arg("scratch"), py::arg("stream"));

  module.def(
      "gan_loss_scratch",
      [](int dtype, const py::tuple& groups) {
        return cuda::gan_loss_scratch(gan_loss_of(dtype, groups, 0));
      },
      py::arg("dtype"), py::arg("groups"));

  module.def(
      "gan_loss",
      [](int dtype, const py::tuple& groups, Address loss, Address scratch, Address stream) {
        const pygan::GanLoss args = gan_loss_of(dtype, groups, loss);
        py::gil_scoped_release release;
        raise_unless_ok(cuda::gan_loss(args, pointer<float>(scratch), pointer<void>(stream)));
      },
      py::arg("dtype"), py::arg("groups"), py::arg("loss"), py::arg("scratch"), py::arg("stream"));

  module.def(
      "image_batch",
      [](Address images, int64_t count, int64_t height, int64_t width, int64_t channels,
         Address index, Address flip, int64_t batch, int dtype, Address out, Address stream) {
        const pygan::ImageBatch args{pointer<const uint8_t>(images),
                                     count,
                                     height,
                                     width,
                                     channels,
                                     pointer<const int64_t>(index),
                                     pointer<const uint8_t>(flip),
                                     batch,
                                     static_cast<pygan::DType>(dtype),
                                     pointer<void>(out),
                                     1};
        py::gil_scoped_release release;
        raise_unless_ok(cuda::image_batch(args, pointer<void>(stream)));
      },
      py::arg("images"), py::arg("count"), py::arg("height"), py::arg("width"), py::arg("channels"),
      py::arg("index"), py::arg("flip"), py::arg("batch"), py::arg("dtype"), py::arg("out"),
      py::arg("stream"));
}
